"""From what the user wrote to what will run: every `auto` decided, every impossibility refused with its fix. Pure."""

from collections import Counter
from typing import NamedTuple

from phalanx.deploy.config import ClusterConfig, conflicts
from phalanx.deploy.hardware import Hardware, Node
from phalanx.deploy.placement import Seat, seat_ranks
from phalanx.deploy.plan import (
    DeploymentPlan,
    KvPlan,
    ModelPlan,
    ParallelPlan,
    RankPlan,
    SchedulerPlan,
    WorkersPlan,
)
from phalanx.deploy.refusals import (
    count_room,
    even_divisions,
    expert_slots,
    model_problems,
    network_problems,
    seat_problems,
)
from phalanx.errors import ConfigError
from phalanx.models.spec import DecoderConfig
from phalanx.parallel.mesh import MeshShape
from phalanx.parallel.pipeline import split_layers
from phalanx.runtime.expert_config import resolve_experts
from phalanx.runtime.memory import ITEMSIZE, Batch, Share, StageBytes, cpu_share, gpu_share, size_pool, stage_bytes

MAX_GPU_RANK_THREADS = 8
"""More host threads do not make a GPU rank faster; they only load and sample."""


class _Tenant(NamedTuple):
    """A rank with its place, its layers, what it needs and what it may use."""

    seat: Seat
    node: Node
    layers: tuple[int, int]
    needs: StageBytes
    share: Share


def resolve(config: ClusterConfig, hardware: Hardware, model: DecoderConfig) -> DeploymentPlan:
    """Decide everything.

    device: CUDA if any node has a GPU. dtype: the checkpoint's. block_size: 64 on CUDA, 16 on CPU. max_batch_tokens:
    8192 on CUDA, 512 on CPU. threads: the node's CPUs shared evenly (at most 8 per GPU rank).
    num_blocks, max_model_len: see `size_pool`; a rank may use `gpu_fraction` of its GPU, or on the CPU an even part of
    the node's memory with a fifth of that for KV.

    Raises:
        ConfigError: the deployment cannot work; one line per reason, each with the fix.
    """
    device = _device(config, hardware)
    dtype = model.dtype if config.model.dtype == "auto" else config.model.dtype
    parallel, scheduler, is_cuda = config.parallel, config.scheduler, device == "cuda"
    shape = MeshShape(pp=parallel.pipeline, dp=parallel.data, tp=parallel.tensor)
    room = count_room(config, hardware, device)
    problems = [f"{problem.keys[0]}: {problem.sentence}" for problem in conflicts(config)]
    problems += [*model_problems(config, model, dtype), *seat_problems(config, hardware, room)]
    problems += network_problems(config, hardware)
    if problems:
        raise ConfigError("\n".join(problems))

    override = None if isinstance(parallel.stage_layers, str) else parallel.stage_layers
    ranges = split_layers(len(model.layers), shape.pp, override)
    stage_layers = tuple(end - first for first, end in ranges)
    block_size = _number(config.kv.block_size) or (64 if is_cuda else 16)
    max_batch_tokens = _number(scheduler.max_batch_tokens) or (8192 if is_cuda else 512)
    batch = Batch(max_batch_tokens, scheduler.max_sequences)
    experts = resolve_experts(model, shape, ranges, ITEMSIZE[dtype], config.moe.options)
    slots = None if experts is None else experts.slots_per_rank
    needs = [
        stage_bytes(model, shape, stage, layers, ITEMSIZE[dtype], block_size, batch, slots)
        for stage, layers in enumerate(ranges)
    ]
    seats = seat_ranks(shape, config.replicas, room.groups, spread=not is_cuda)
    neighbours = Counter(seat.node for seat in seats)
    tenants = []
    for seat in seats:
        node, stage = hardware.nodes[seat.node], seat.coordinate.pp
        gpu = gpu_share(node.gpu_memory_bytes, config.kv.gpu_fraction)
        share = gpu if is_cuda else cpu_share(node.memory_bytes, neighbours[seat.node])
        tenants.append(_Tenant(seat, node, ranges[stage], needs[stage], share))
    pool = size_pool(
        [(tenant.needs, tenant.share) for tenant in tenants],
        block_size=block_size,
        num_blocks=_number(config.kv.num_blocks),
        max_model_len=_number(scheduler.max_model_len),
        max_position=model.max_position,
        max_sequences=scheduler.max_sequences,
    )
    fair_threads = min(hardware.nodes[node].cpus // ranks for node, ranks in neighbours.items())
    threads = max(1, min(fair_threads, MAX_GPU_RANK_THREADS) if is_cuda else fair_threads)
    return DeploymentPlan(
        model=ModelPlan(path=config.model.path, dtype=dtype, name=_model_name(config)),
        ray=config.ray,
        device=device,
        replicas=config.replicas,
        parallel=ParallelPlan(tensor=shape.tp, pipeline=shape.pp, data=shape.dp, stage_layers=stage_layers),
        scheduler=SchedulerPlan(
            max_batch_tokens=max_batch_tokens,
            max_sequences=scheduler.max_sequences,
            max_model_len=pool.max_model_len,
            max_queue=scheduler.max_queue,
        ),
        kv=KvPlan(
            gpu_fraction=config.kv.gpu_fraction,
            num_blocks=pool.num_blocks,
            block_size=block_size,
            cpu_memory=config.kv.cpu_memory,
            prefix_cache=config.kv.prefix_cache,
        ),
        moe=config.moe,
        server=config.server,
        workers=WorkersPlan(threads=_number(config.workers.threads) or threads),
        kernels=dict(config.kernels),
        ranks=tuple(_rank(tenant, pool.num_blocks) for tenant in tenants),
        checks=(*even_divisions(model, shape, stage_layers), *expert_slots(experts, shape)),
    )


def _number(value: int | str) -> int | None:
    """None for "auto"."""
    return None if isinstance(value, str) else value


def _device(config: ClusterConfig, hardware: Hardware) -> str:
    has_gpu = any(node.gpus for node in hardware.nodes)
    if config.device == "cuda" and not has_gpu:
        raise ConfigError(f"device is cuda, but none of {len(hardware.nodes)} nodes has a GPU; use device: cpu")
    if config.device == "auto":
        return "cuda" if has_gpu else "cpu"
    return config.device


def _model_name(config: ClusterConfig) -> str:
    path = config.model.path.rstrip("/")
    return (path.rpartition("/")[2] or path) if config.model.name == "auto" else config.model.name


def _rank(tenant: _Tenant, num_blocks: int) -> RankPlan:
    seat, (first_layer, end_layer) = tenant.seat, tenant.layers
    return RankPlan(
        replica=seat.replica,
        rank=seat.rank,
        pp=seat.coordinate.pp,
        dp=seat.coordinate.dp,
        tp=seat.coordinate.tp,
        node=tenant.node.name,
        slot=seat.slot,
        first_layer=first_layer,
        end_layer=end_layer,
        weight_bytes=tenant.needs.weights,
        workspace_bytes=tenant.needs.workspace,
        kv_bytes=num_blocks * tenant.needs.block,
        limit_bytes=tenant.share.limit,
    )
