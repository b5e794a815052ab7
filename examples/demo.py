"""The main job on the embedded models, on a local two-node Ray cluster, three streams over gRPC each:

    tiny       dense, tensor 2 x pipeline 2
    tiny-moe   mixture of experts, data 2: expert-parallel over the two nodes with a two-hop exchange

Starts what `phalanx up` starts, streams three prompts at once with a progress display, prints what ran where, how fast,
and how much each rank's experts had to do; stops everything, and fails if a process is left.
"""

import sys
import threading
import time
from pathlib import Path

import psutil
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from phalanx import Client, SamplingParams
from phalanx.deploy.config import parse_config
from phalanx.deploy.plan_text import plan_text
from phalanx.deploy.ray_cluster import RayCluster, local_hardware
from phalanx.deploy.resolve import resolve
from phalanx.deploy.supervisor import Progress, Supervisor
from phalanx.models.loading import read_config, resolve_path

COMMON = """
ray: {address: local, nodes: 2}
device: cpu
scheduler: {max_sequences: 16}
workers: {threads: 1}
server: {listen: 127.0.0.1:0, metrics: 'off'}
"""
DENSE = """
model: {path: tiny, dtype: float32}
parallel: {tensor: 2, pipeline: 2}
"""
EXPERTS = """
model: {path: tiny-moe, dtype: float32}
parallel: {data: 2}
moe: {dispatch: two_hop, redundant_experts: 4}
"""
PROMPTS = (
    "def read_lines(path):\n    with open(path) as",
    "class Stack:\n    def __init__(self",
    "import os\nimport sys\n\n\ndef main(",
)
MAX_TOKENS = 96
HEARTBEAT_S = 0.6
"""Until the controller knows the figures of the last step."""

START_S = 120.0


class Demo:
    """The client's side; runs in a thread while the main thread supervises."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.address = ""
        self.ready = threading.Event()
        self.error: Exception | None = None

    def report(self, progress: Progress) -> None:
        """Take the supervisor's progress."""
        if progress.event != "log":
            self.console.print(f"[bold]{progress.event}[/]: {progress.text}", highlight=False)
        if progress.event == "controller":
            self.address = progress.text.rpartition(" ")[2]
        self.ready.set() if progress.event == "ready" else None

    def run(self, supervisor: Supervisor) -> None:
        """Stream, print, and stop the deployment whatever happened."""
        try:
            if not self.ready.wait(START_S):
                raise TimeoutError(f"no replica was ready within {START_S:.0f} s")
            self._stream()
        except Exception as error:
            self.error = error
        finally:
            supervisor.stop()

    def _stream(self) -> None:
        texts, counts = [""] * len(PROMPTS), [0] * len(PROMPTS)
        with Client(self.address) as client, Live(console=self.console, refresh_per_second=12) as live:
            started = time.perf_counter()

            def follow(number: int) -> None:
                params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.7, top_p=0.9, seed=number, ignore_eos=True)
                for chunk in client.generate(PROMPTS[number], params):
                    texts[number] += chunk.text
                    counts[number] += len(chunk.token_ids)

            threads = [threading.Thread(target=follow, args=(number,)) for number in range(len(PROMPTS))]
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                live.update(show(texts, counts))
                time.sleep(0.05)
            seconds = time.perf_counter() - started
            live.update(show(texts, counts))
            time.sleep(HEARTBEAT_S)
            state = client.status()
        if counts != [MAX_TOKENS] * len(PROMPTS):
            raise RuntimeError(f"streams ended with {counts} of {MAX_TOKENS} tokens")
        table = Table("replica", "what ran where", title="cluster")
        for replica in state.replicas:
            table.add_row(str(replica.replica), "\n".join(replica.ranks))
        self.console.print(table)
        for replica in state.replicas:
            if replica.expert_load:
                self.console.print(expert_table(replica.expert_load))
        self.console.print(f"[bold]{sum(counts)} tokens in {seconds:.2f} s: {sum(counts) / seconds:.0f} tokens/s[/]")


def show(texts: list[str], counts: list[int]) -> Group:
    """The three streams side by side in time."""
    return Group(
        *(
            Panel(Text(prompt, style="dim") + Text(text), title=f"stream {number}: {count}/{MAX_TOKENS} tokens")
            for number, (prompt, text, count) in enumerate(zip(PROMPTS, texts, counts, strict=True))
        )
    )


def expert_table(loads: tuple[int, ...]) -> Table:
    """How many tokens met the experts of each rank."""
    table = Table("expert rank", "tokens", "", title="expert load")
    for rank, load in enumerate(loads):
        table.add_row(str(rank), str(load), "#" * round(40 * load / max(loads)) if any(loads) else "")
    return table


def main() -> int:
    """Run both parts; 0 = all streams ended and nothing is left."""
    console = Console()
    return max(serve(console, DENSE), serve(console, EXPERTS))


def serve(console: Console, text: str) -> int:
    """One deployment from start to end."""
    config = parse_config(text + COMMON, str(Path(__file__).name))
    plan = resolve(config, local_hardware(config.ray.nodes), read_config(resolve_path(config.model.path)))
    console.print(plan_text(plan))
    begun = time.perf_counter()
    console.print("starting a local Ray cluster with 2 nodes ...")
    cluster = RayCluster(config.ray)
    demo = Demo(console)
    try:
        console.print(f"[bold]ray[/]: 2 nodes are up after {time.perf_counter() - begun:.1f} s")
        supervisor = Supervisor(plan, demo.report)
        client = threading.Thread(target=demo.run, args=(supervisor,))
        client.start()
        try:
            supervisor.run()
        finally:
            demo.ready.set()
            client.join()
        family = psutil.Process().children(recursive=True)
    finally:
        cluster.close()
    if demo.error is not None:
        console.print(f"[bold red]failed:[/] {demo.error}")
        return 1
    _, left = psutil.wait_procs(family, timeout=10)
    left += psutil.Process().children(recursive=True)
    console.print(f"stopped after {time.perf_counter() - begun:.1f} s; {len(left)} processes left behind")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
