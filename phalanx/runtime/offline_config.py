"""From the arguments of `LLM` to a resolved engine on this machine."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import msgspec
import psutil
import torch

from phalanx.errors import ConfigError
from phalanx.models.spec import DecoderConfig
from phalanx.moe.spec import CapacitySpec
from phalanx.parallel.mesh import MeshShape
from phalanx.parallel.pipeline import split_layers
from phalanx.runtime.engine_config import EngineConfig
from phalanx.runtime.expert_config import ExpertOptions, resolve_experts
from phalanx.runtime.memory import ITEMSIZE, Batch, cpu_share, gpu_share, size_pool, stage_bytes

Auto = Literal["auto"]
Section = TypeVar("Section", bound=msgspec.Struct)

BLOCK_SIZES = (8, 16, 32, 64, 128, 256)


class SchedulerSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`scheduler` of `LLM`; keys and defaults of the YAML section."""

    max_batch_tokens: int | Auto = "auto"
    max_sequences: int = 256
    max_model_len: int | Auto = "auto"


class KvSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`kv` of `LLM`; keys and defaults of the YAML section."""

    gpu_fraction: float = 0.9
    num_blocks: int | Auto = "auto"
    block_size: int | Auto = "auto"
    prefix_cache: bool = True


class RebalanceSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`moe.rebalance` of `LLM`; keys and defaults of the YAML section."""

    interval_steps: int = 3000
    max_moved: float = 0.1


class CapacitySection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`moe.capacity` of `LLM`; factor 0 = dropless."""

    factor: float = 0.0
    min_capacity: int = 1
    priority: Literal["fifo", "bpr", "probs"] = "fifo"
    overflow: Literal["drop", "next"] = "drop"


class MoeSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`moe` of `LLM`; keys and defaults of the YAML section."""

    dispatch: Literal["auto", "local", "allgather", "flat", "two_hop"] = "auto"
    exact: bool = False
    redundant_experts: int = 0
    node_size: int = 0
    on_rank_loss: Literal["restart", "shrink"] = "restart"
    rebalance: RebalanceSection = RebalanceSection()
    capacity: CapacitySection = CapacitySection()


class WorkersSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`workers` of `LLM`; threads = CPU threads per rank."""

    threads: int | Auto = "auto"


def resolve_offline(
    path: str,
    model: DecoderConfig,
    shape: MeshShape,
    *,
    stage_layers: Sequence[int] | None,
    device: str,
    dtype: str,
    scheduler: Mapping[str, Any],
    kv: Mapping[str, Any],
    workers: Mapping[str, Any],
    moe: Mapping[str, Any],
    kernels: Mapping[str, str],
) -> EngineConfig:
    """Decide everything that is "auto", by the rules of a deployment's plan, for this machine alone.

    Raises:
        ConfigError: a key is unknown or of another type, or the layout cannot work here.
    """
    batch, pool = _section("scheduler", scheduler, SchedulerSection), _section("kv", kv, KvSection)
    threads = _section("workers", workers, WorkersSection).threads
    expert_options = _expert_options(_section("moe", moe, MoeSection))
    _check_ranges(shape, batch, pool, threads)
    device = _device(device, shape)
    dtype = model.dtype if dtype == "auto" else dtype
    if dtype not in ITEMSIZE:
        raise ConfigError(f"dtype ({dtype!r}) is not supported; use one of auto, {', '.join(ITEMSIZE)}")
    is_cuda = device == "cuda"
    block_size = _choose(pool.block_size, 64 if is_cuda else 16)
    max_batch_tokens = _choose(batch.max_batch_tokens, 8192 if is_cuda else 512)
    ranges = split_layers(len(model.layers), shape.pp, tuple(stage_layers) if stage_layers else None)
    experts = resolve_experts(model, shape, ranges, ITEMSIZE[dtype], expert_options)
    slots = None if experts is None else experts.slots_per_rank
    limits = Batch(max_batch_tokens, batch.max_sequences)
    if is_cuda:
        share = gpu_share(torch.cuda.mem_get_info()[0], pool.gpu_fraction)
    else:
        share = cpu_share(psutil.virtual_memory().available, shape.world_size)
    stages = [
        (stage_bytes(model, shape, stage, layers, ITEMSIZE[dtype], block_size, limits, slots), share)
        for stage, layers in enumerate(ranges)
    ]
    spec = size_pool(
        stages,
        block_size=block_size,
        num_blocks=None if pool.num_blocks == "auto" else pool.num_blocks,
        max_model_len=None if batch.max_model_len == "auto" else batch.max_model_len,
        max_position=model.max_position,
        max_sequences=batch.max_sequences,
    )
    return EngineConfig(
        model_path=path,
        model=model,
        shape=shape,
        stage_layers=ranges,
        device=device,
        dtype=dtype,
        kv=spec,
        prefix_cache=pool.prefix_cache,
        max_batch_tokens=max_batch_tokens,
        max_sequences=batch.max_sequences,
        num_threads=_choose(threads, _fair_threads(shape.world_size) if shape.world_size > 1 else 0),
        kernels=dict(kernels),
        experts=experts,
    )


def _expert_options(section: MoeSection) -> ExpertOptions:
    for name, value, low, high in (
        ("moe.redundant_experts", section.redundant_experts, 0, 2**16),
        ("moe.node_size", section.node_size, 0, 1024),
        ("moe.rebalance.interval_steps", section.rebalance.interval_steps, 0, 2**31),
    ):
        if not low <= value <= high:
            raise ConfigError(f"{name} ({value!r}) must be an integer from {low} to {high}")
    if not 0 < section.rebalance.max_moved <= 1:
        raise ConfigError(f"moe.rebalance.max_moved ({section.rebalance.max_moved}) must be a number in (0, 1]")
    limit, capacity = section.capacity, None
    if limit.factor:
        capacity = CapacitySpec(
            factor=limit.factor, min_capacity=limit.min_capacity, priority=limit.priority, overflow=limit.overflow
        )
    return ExpertOptions(
        dispatch=section.dispatch,
        exact=section.exact,
        redundant_experts=section.redundant_experts,
        node_size=section.node_size,
        on_rank_loss=section.on_rank_loss,
        rebalance_interval=section.rebalance.interval_steps,
        max_moved=section.rebalance.max_moved,
        capacity=capacity,
    )


def _check_ranges(shape: MeshShape, batch: SchedulerSection, pool: KvSection, threads: int | Auto) -> None:
    """Ranges of the YAML; what the sizes must be to each other is checked where they meet."""
    for name, value, low, high in (
        ("tensor", shape.tp, 1, 1024),
        ("pipeline", shape.pp, 1, 1024),
        ("data", shape.dp, 1, 1024),
        ("scheduler.max_batch_tokens", batch.max_batch_tokens, 1, 2**20),
        ("scheduler.max_sequences", batch.max_sequences, 1, 2**16),
        ("scheduler.max_model_len", batch.max_model_len, 1, 2**26),
        ("kv.num_blocks", pool.num_blocks, 2, 2**31 - 1),
        ("workers.threads", threads, 1, 1024),
    ):
        if value != "auto" and (type(value) is not int or not low <= value <= high):
            raise ConfigError(f"{name} ({value!r}) must be an integer from {low} to {high}")
    if pool.block_size != "auto" and pool.block_size not in BLOCK_SIZES:
        raise ConfigError(f"kv.block_size ({pool.block_size}) must be one of {', '.join(map(str, BLOCK_SIZES))}")
    if not 0 < pool.gpu_fraction <= 1:
        raise ConfigError(f"kv.gpu_fraction ({pool.gpu_fraction}) must be a number in (0, 1]")


def _device(device: str, shape: MeshShape) -> str:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"device ({device!r}) is not supported; use auto, cpu or cuda")
    if device == "cuda" and torch.cuda.device_count() < shape.world_size:
        raise ConfigError(
            f"{shape.world_size} ranks need as many GPUs, this machine has {torch.cuda.device_count()}; "
            'lower tensor, pipeline or data, or use device="cpu"'
        )
    return device


def _fair_threads(num_ranks: int) -> int:
    return max(1, (psutil.cpu_count() or 1) // num_ranks)


def _choose(value: int | Auto, otherwise: int) -> int:
    return otherwise if value == "auto" else value


def _section(name: str, given: Mapping[str, Any], kind: type[Section]) -> Section:
    try:
        return msgspec.convert(dict(given), kind)
    except msgspec.ValidationError as error:
        keys = ", ".join(field.name for field in msgspec.structs.fields(kind))
        raise ConfigError(f"{name}: {error}; valid keys: {keys}") from error
