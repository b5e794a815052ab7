"""Expert balance: what the solvers reach after the load changed, what they move, and how long they take.

    python -m benchmarks.placement

Loads are synthetic (Zipf popularity in random order, normal noise per expert), means of three draws. EPLB is the
global policy of DeepSeek's balancer, written again for this comparison. Second table: copies of a token that leave its
node, and hottest over mean rank load, by replica choice.
"""

import os

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

from tests.support import placement_study as placement


def print_solvers() -> None:
    header = False
    for shape in placement.SHAPES:
        for skew in placement.SKEWS:
            for noise in placement.NOISES:
                row = list(placement.cells(placement.study(shape, skew, noise)))
                if not header:
                    print(f"{'shape':16} zipf noise  " + "  ".join(f"{name.strip():>11}" for name, _ in row))
                    header = True
                print(f"{shape!s:16} {skew:4} {noise:5.0%}  " + "  ".join(f"{text:>11}" for _, text in row))


def print_replica_choice() -> None:
    print(
        f"\n{'shape':16} zipf  " + "  ".join(f"{name:>21}" for name in ("hash: copies / peak", "node: copies / peak"))
    )
    for shape in placement.SHAPES[:2]:
        for skew in placement.SKEWS:
            choices = [placement.choose_replicas(shape, skew, mode, 512) for mode in ("hash", "node")]
            print(f"{shape!s:16} {skew:4}  " + "  ".join(f"{c.node_copies:13.2f} / {c.peak:.3f}" for c in choices))


if __name__ == "__main__":
    print_solvers()
    print_replica_choice()
