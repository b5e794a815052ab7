"""What a cluster has, as the planner sees it: counted elsewhere, given as an argument."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One machine.

    Attributes:
        cpus: logical CPUs that ranks may use.
        gpus: CUDA devices.
        gpu_memory_bytes: of each GPU; of the smallest one where they differ. 0 without GPUs.
        memory_bytes: main memory that ranks may use.
    """

    name: str
    cpus: int
    gpus: int
    gpu_memory_bytes: int
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """The machines, in the order in which they are filled."""

    nodes: tuple[Node, ...]
