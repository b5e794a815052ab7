"""What cannot be laid out on the given machines, one sentence with the fix each; and the divisions that come out."""

from collections.abc import Iterator
from typing import NamedTuple

from phalanx.deploy.config import ClusterConfig
from phalanx.deploy.hardware import Hardware
from phalanx.models.spec import AttentionSpec, DecoderConfig, MlpSpec
from phalanx.parallel.mesh import MeshShape
from phalanx.runtime.expert_config import ExpertConfig
from phalanx.runtime.memory import ITEMSIZE

LOOPBACK_NAMES = ("localhost", "[::1]")

MAX_TENSOR = 128
"""Sizes of the tensor axis that are tried for the list of possible ones."""


class Division(NamedTuple):
    """A count of the model that the tensor axis must share out evenly."""

    what: str
    total: int
    may_replicate: bool

    def fits(self, tensor: int) -> bool:
        """True if every rank gets the same number, or each unit the same number of ranks."""
        return self.total % tensor == 0 or (self.may_replicate and tensor % self.total == 0)


class Room(NamedTuple):
    """What the nodes offer, in GPUs or CPUs.

    Attributes:
        unit: "GPUs" or "CPUs".
        per_rank: units that a rank takes.
        units: of each node.
        groups: tensor groups that each node can hold.
    """

    unit: str
    per_rank: int
    units: list[int]
    groups: list[int]


def count_room(config: ClusterConfig, hardware: Hardware, device: str) -> Room:
    """A rank takes a GPU, or on the CPU `workers.threads` CPUs (one while that is auto)."""
    if device == "cuda":
        unit, per_rank, units = "GPUs", 1, [node.gpus for node in hardware.nodes]
    else:
        threads = config.workers.threads
        unit, per_rank = "CPUs", 1 if isinstance(threads, str) else threads
        units = [node.cpus for node in hardware.nodes]
    return Room(unit, per_rank, units, [count // per_rank // config.parallel.tensor for count in units])


def model_problems(config: ClusterConfig, model: DecoderConfig, dtype: str) -> Iterator[str]:
    """What this model cannot be split or served as."""
    tensor, pipeline, stage_layers = config.parallel.tensor, config.parallel.pipeline, config.parallel.stage_layers
    divisions, num_layers = _divisions(model), len(model.layers)
    possible = [size for size in range(1, MAX_TENSOR + 1) if all(division.fits(size) for division in divisions)]
    for what, total, may_replicate in (division for division in divisions if not division.fits(tensor)):
        relation = "neither divides nor is a multiple of" if may_replicate else "does not divide"
        use = ", ".join(map(str, possible))
        yield f"parallel.tensor ({tensor}) {relation} {what} ({total}); this model allows {use}"
    if pipeline > num_layers:
        yield f"parallel.pipeline ({pipeline}) is more than the model's layers ({num_layers}); use {num_layers} or less"
    if not isinstance(stage_layers, str) and sum(stage_layers) != num_layers:
        yield (
            f"parallel.stage_layers {list(stage_layers)} add up to {sum(stage_layers)}, but the model has {num_layers} "
            "layers; make them equal or write auto"
        )
    if dtype not in ITEMSIZE:
        yield f"model.dtype: the checkpoint's own {dtype!r} cannot be served; write one of {', '.join(ITEMSIZE)}"
    wanted = config.scheduler.max_model_len
    if not isinstance(wanted, str) and wanted > model.max_position:
        yield (
            f"scheduler.max_model_len ({wanted}) is more than the {model.max_position} positions the model was made "
            f"for; use {model.max_position} or less"
        )


def seat_problems(config: ClusterConfig, hardware: Hardware, room: Room) -> Iterator[str]:
    """What the nodes cannot hold; a tensor group must sit on one of them."""
    tensor, pipeline, data = config.parallel.tensor, config.parallel.pipeline, config.parallel.data
    num_groups = config.replicas * pipeline * data
    each = f"{tensor} ranks ({tensor * room.per_rank} {room.unit})"
    if not any(room.groups):
        best = max(room.units, default=0)
        yield (
            f"parallel.tensor ({tensor}): a group of {each} must sit on one node and the largest has {best} "
            f"{room.unit}; use tensor: {max(best // room.per_rank, 1)} or less with a larger parallel.pipeline"
        )
    elif sum(room.groups) < num_groups:
        nodes = ", ".join(f"{node.name}: {units}" for node, units in zip(hardware.nodes, room.units, strict=True))
        yield (
            f"replicas ({config.replicas}) x parallel.pipeline ({pipeline}) x parallel.data ({data}) = {num_groups} "
            f"groups of {each}, but the nodes ({nodes} {room.unit}) hold {sum(room.groups)}; lower one of the three or "
            "add nodes"
        )


def network_problems(config: ClusterConfig, hardware: Hardware) -> Iterator[str]:
    """Addresses that the ranks' machines cannot reach; nodes of a cluster are named `address/id`."""
    hosts = {node.name.partition("/")[0] for node in hardware.nodes}
    listen = config.server.engine_listen.rpartition(":")[0]
    if config.ray.address != "local" and len(hosts) > 1 and (listen.startswith("127.") or listen in LOOPBACK_NAMES):
        yield (
            f"server.engine_listen ({config.server.engine_listen}) can be reached from this machine only, but engines "
            f"run on {len(hosts)} machines; write this machine's address in their network, for example 10.0.0.1:0"
        )


def even_divisions(model: DecoderConfig, shape: MeshShape, stage_layers: tuple[int, ...]) -> Iterator[str]:
    """One line per division of an accepted layout, with its result."""
    for what, total, _ in _divisions(model):
        if total % shape.tp == 0:
            yield f"{what} {total} / tensor {shape.tp} = {total // shape.tp} per rank"
        else:
            yield f"{what} {total}: each on {shape.tp // total} of {shape.tp} tensor ranks"
    yield f"layers {len(model.layers)} = {' + '.join(map(str, stage_layers))}"


def expert_slots(experts: ExpertConfig | None, shape: MeshShape) -> Iterator[str]:
    """How the experts of an accepted layout lie on the ranks of a stage."""
    if experts is not None:
        group, slots = shape.dp * shape.tp, experts.slots_per_rank
        most = max(experts.num_experts)
        yield (
            f"experts {most} on {group} ranks x {slots} slots = {group * slots} ({group * slots - most} redundant); "
            f"the group can shrink to data {-(-most // (slots * shape.tp))}"
        )


def _divisions(model: DecoderConfig) -> list[Division]:
    """Distinct counts over all layers."""
    found = []
    for layer in model.layers:
        found.append(Division("num_heads", layer.attention.num_heads, False))
        if isinstance(layer.attention, AttentionSpec):
            found.append(Division("num_kv_heads", layer.attention.num_kv_heads, True))
        if isinstance(layer.mlp, MlpSpec):
            found.append(Division("intermediate_size", layer.mlp.intermediate_size, False))
        elif layer.mlp.shared is not None:
            found.append(Division("shared expert's intermediate_size", layer.mlp.shared.intermediate_size, False))
    return list(dict.fromkeys(found))
