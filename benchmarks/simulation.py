"""What crosses between nodes, counted on simulated ranks: bytes, balance of network cards, time of a huge group.

    python -m benchmarks.simulation

All ranks of a group run in this process, with the dispatchers' own code (`phalanx/parallel/sim_transport.py`); cases
are those of the tests of dispatchers. First table: 2 nodes of 8 ranks, 256 experts, top 8, fp32 rows of 512 values,
bytes per token that go to the other node. Second: bytes received from other nodes, busiest network card (one per rank)
over the mean, experts popular as Zipf 1.0, 8 nodes of 8 ranks, mean of three placements. Third: one layer on 2,048
ranks, 256 nodes of 8, CPU seconds of this process for all of them together.
"""

import statistics
import time

import torch

from phalanx.parallel.sim_transport import simulate
from phalanx.parallel.topology import EpTopology
from phalanx.parallel.traffic import Traffic
from tests.moe.dispatching import make_case, traffic_of, whole_layer

KINDS = {"two_hop": ("two_hop", True), "flat": ("flat", True), "flat, no de-duplication": ("flat", False)}
TOKENS = 4096
HOT_EXPERTS = (64, 128, 256)
PLACEMENTS = 3


def count_bytes(hidden_size: int = 512) -> dict[str, tuple[float, float]]:
    """Per kind: bytes per token between the nodes in dispatch and in combine, counts included."""
    topology = EpTopology.uniform(2, 8)
    shape = {"slots_per_rank": 16, "num_experts": 256, "top_k": 8, "hidden_size": hidden_size}
    case = make_case(topology, [TOKENS // 16] * 16, **shape)
    counted = {}
    for name, (kind, dedup) in KINDS.items():
        going, coming = (between_nodes(traffic) / TOKENS for traffic in traffic_of(case, kind, dedup=dedup))
        counted[name] = going, coming
    return counted


def between_nodes(traffic: Traffic) -> int:
    """Payload and counts."""
    return traffic.total("inter") + traffic.total("inter", kind="counts")


def receive_skew(kind: str, num_experts: int) -> float:
    """Busiest network card over the mean in a dispatch to hot experts."""
    topology = EpTopology.uniform(8, 8)
    shape = {"slots_per_rank": num_experts // 64, "num_experts": num_experts, "top_k": 8}
    cases = (make_case(topology, [64] * 64, **shape, zipf=1.0, seed=seed) for seed in range(PLACEMENTS))
    return statistics.mean(traffic_of(case, kind)[0].receive_skew() for case in cases)


def huge_layer(kind: str, num_tokens: int) -> float:
    """CPU seconds of dispatch, stand-in experts and combine of 2,048 ranks."""
    topology = EpTopology.uniform(256, 8)
    case = make_case(topology, [num_tokens] * 2048, slots_per_rank=1, num_experts=2048, top_k=8)
    exchanges = [whole_layer(case, kind, rank) for rank in range(2048)]
    begin = time.process_time()
    simulate(topology, exchanges)
    return time.process_time() - begin


def main() -> None:
    torch.set_num_threads(1)
    counted = count_bytes()
    base = counted["two_hop"]
    print(f"{'bytes between nodes, 2 x 8':28}{'dispatch':>10}{'/ two_hop':>11}{'combine':>10}{'/ two_hop':>11}")
    for name, both in counted.items():
        print(f"{name:28}" + "".join(f"{b:10.0f}{b / of_base:11.2f}" for b, of_base in zip(both, base, strict=True)))
    print(f"\n{'receive max / mean, 8 x 8':28}" + "".join(f"{f'{num} experts':>14}" for num in HOT_EXPERTS))
    for kind in ("two_hop", "flat"):
        print(f"{kind:28}" + "".join(f"{receive_skew(kind, num):14.2f}" for num in HOT_EXPERTS), flush=True)
    seconds = huge_layer("two_hop", 2)
    print(f"\none layer, 2,048 ranks of 2 tokens, two_hop: {seconds:.2f} s")


if __name__ == "__main__":
    main()
