"""Offline throughput of one process beside peers on the same checkpoint, machine and prompts.

    benchmarks/offline.py [--kind dense|moe] [CHECKPOINT] [--peer NAME[=PYTHON]]... [--peers DIR] [--out FILE]

CHECKPOINT defaults to the one that `make_checkpoint.py` of the peers folder writes (kept under ~/.cache/phalanx). A
peer is a `run_NAME.py` of that folder, run by PYTHON (this interpreter unless it has an environment of its own, as
vllm has). The workload is the peers' own: random ids from a fixed seed, greedy, no early stop, no prefix cache. Each
side runs `--rounds` times, turn about; a row is the median. Prints JSON rows, then a table with the ratio.
"""

import argparse
import json
import os
import pathlib
import platform
import random
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parent.parent
PEERS = ROOT.parent / "shared" / "peers"
CACHE = pathlib.Path.home() / ".cache" / "phalanx" / "bench"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint", nargs="?")
    p.add_argument("--peers", type=pathlib.Path, default=PEERS)
    p.add_argument("--kind", choices=("dense", "moe"), default="dense")
    p.add_argument("--peer", action="append", default=[], metavar="NAME[=PYTHON]")
    p.add_argument("--concurrency", default="1,8,32")
    p.add_argument("--prompt-tokens", type=int, default=128)
    p.add_argument("--output-tokens", type=int, default=64)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--device", default="auto")
    p.add_argument("--out", type=pathlib.Path)
    p.add_argument("--phalanx-only", action="store_true", help="one round of phalanx in this process")
    a = p.parse_args()
    if a.phalanx_only:
        run_phalanx(a)
        return
    checkpoint = a.checkpoint or peers_checkpoint(a.peers, a.kind)
    if checkpoint is None:
        print("no checkpoint given and no peers folder beside the repository: nothing to measure")
        return
    workload = ["--concurrency", a.concurrency, "--prompt-tokens", str(a.prompt_tokens)]
    workload += ["--output-tokens", str(a.output_tokens)]
    ours = [sys.executable, __file__, checkpoint, "--phalanx-only", "--device", a.device, *workload]
    commands = [ours]
    for peer in a.peer or ["transformers"]:
        name, _, python = peer.partition("=")
        script = a.peers / f"run_{name}.py"
        if script.exists():
            commands.append([python or sys.executable, str(script), checkpoint, *workload])
    rows: dict[tuple[str, int], list[float]] = {}
    for _ in range(a.rounds):
        for command in commands:
            for row in run(command):
                rows.setdefault((row["peer"], row["concurrency"]), []).append(row["output_tok_s"])
    report(rows, a.out, checkpoint)


def peers_checkpoint(peers: pathlib.Path, kind: str) -> str | None:
    """A checkpoint of the peers' recipe, made once."""
    folder = CACHE / kind
    if not (folder / "model.safetensors").exists():
        if not (peers / "make_checkpoint.py").exists():
            return None
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, str(peers / "make_checkpoint.py"), kind, str(folder)], check=True)
    return str(folder)


def cpu_name() -> str:
    """What /proc/cpuinfo calls this machine, with its CPU count."""
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {os.cpu_count()} CPUs"


def run(command: list[str]) -> list[dict]:
    """The rows a side prints, echoed."""
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    for row in rows:
        print(json.dumps(row), flush=True)
    return [row for row in rows if "output_tok_s" in row]


def run_phalanx(a: argparse.Namespace) -> None:
    """The peers' workload (`common.py`) on our engine."""
    from phalanx import LLM, SamplingParams

    start = time.time()
    rng = random.Random(0)
    llm = LLM(a.checkpoint, device=a.device, kv={"prefix_cache": False}, scheduler={"max_model_len": 2048})
    print(json.dumps({"peer": "phalanx", "start_seconds": round(time.time() - start, 1)}), flush=True)

    def generate(prompts: list[list[int]], count: int) -> int:
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        return sum(len(out.token_ids) for out in llm.generate(prompts, params))

    generate([[rng.randrange(10, 30000) for _ in range(8)]], 2)
    for concurrency in map(int, a.concurrency.split(",")):
        prompts = [[rng.randrange(10, 30000) for _ in range(a.prompt_tokens)] for _ in range(concurrency)]
        start = time.time()
        made = generate(prompts, a.output_tokens)
        seconds = time.time() - start
        row = {"peer": "phalanx", "concurrency": concurrency, "prompt_tokens": a.prompt_tokens}
        row |= {"output_tokens": a.output_tokens, "seconds": round(seconds, 2)}
        print(json.dumps(row | {"output_tok_s": round(made / seconds, 1)}), flush=True)


def report(rows: dict[tuple[str, int], list[float]], out: pathlib.Path | None, checkpoint: str) -> None:
    """Medians and ratios, for people and (with --out) as one JSON file."""
    medians = {key: statistics.median(values) for key, values in rows.items()}
    peers = sorted({peer for peer, _ in medians} - {"phalanx"})
    table = []
    for concurrency in sorted({concurrency for _, concurrency in medians}):
        ours = medians["phalanx", concurrency]
        row: dict[str, float] = {"concurrency": concurrency, "phalanx": ours}
        text = [f"concurrency {concurrency:3}: phalanx {ours} tok/s"]
        for peer in peers:
            theirs = medians[peer, concurrency]
            row |= {peer: theirs, f"ratio to {peer}": round(ours / theirs, 2)}
            text.append(f"{peer} {theirs} tok/s, ratio {ours / theirs:.2f}")
        table.append(row)
        print("; ".join(text))
    if out is not None:
        import torch
        import transformers

        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        machine = {"cpu": cpu_name(), "versions": versions, "rounds": max(map(len, rows.values()))}
        out.write_text(json.dumps({"machine": machine, "checkpoint": checkpoint, "rows": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
