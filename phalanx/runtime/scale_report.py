"""What an engine says about scaling: an estimate before, the state on the way. Pure."""

from collections.abc import Sequence

from phalanx.errors import ConfigError
from phalanx.models.sizes import expert_parameter_count
from phalanx.parallel.mesh import MeshShape
from phalanx.runtime.engine import Engine
from phalanx.runtime.engine_config import EngineConfig
from phalanx.runtime.expert_config import moe_specs
from phalanx.runtime.frames import ScaleEstimate, ScaleState, StageBytes
from phalanx.runtime.memory import ITEMSIZE, Batch, stage_bytes
from phalanx.runtime.scaling import ScaleOp


def estimate(engine: Engine, call: int, data: int, leave: Sequence[str] = ()) -> ScaleEstimate:
    """What scaling to `data` dp ranks, none of them on the nodes to `leave`, would take, or why it cannot be."""
    mesh, config = engine.mesh, engine.config
    refusal, num_rows, num_bytes = "", 0, 0
    stages: list[StageBytes] = []
    try:
        mesh.check_target(data)
        sizes = _row_bytes(config)
        for layer, target in mesh.evacuation(data, leave).items():
            before = mesh.planner.placements[layer].physical_to_logical if mesh.planner else ()
            moved = sum(a != b for a, b in zip(before, target.physical_to_logical, strict=True))
            num_rows, num_bytes = num_rows + moved, num_bytes + moved * sizes[layer]
        stages = [_stage(config, data, stage) for stage in range(config.shape.pp)]
    except ConfigError as error:
        refusal = str(error)
    return ScaleEstimate(
        call=call,
        refusal=refusal,
        generation=mesh.generation,
        old=len(mesh.units),
        new=data,
        pp=config.shape.pp,
        tp=config.shape.tp,
        slots_per_rank=config.experts.slots_per_rank if config.experts else 0,
        num_experts=max(config.experts.num_experts) if config.experts else 0,
        stages=stages,
        moved_rows=num_rows,
        moved_bytes=num_bytes,
        nodes=mesh.nodes,
    )


def state(engine: Engine, op: ScaleOp) -> ScaleState:
    """How an operation stands; `ranks` are those of the members only."""
    goal, is_done = op.goal, op.phase == "DONE"
    units = [list(goal.ranks_of[unit]) for unit in goal.new if unit not in goal.old]
    # What a repair goes on without may be frozen: survivors that wait for it wake up when it is ended, not before.
    removed = list(goal.removed)
    gone = {"PREPARING": removed if goal.is_repair else [], "DONE": removed, "ABORTED": list(goal.added)}
    return ScaleState(
        op_id=goal.op_id,
        phase=op.phase,
        detail=op.detail,
        data=len(engine.mesh.units),
        wanted=[] if op.is_over else units,
        gone=gone.get(op.phase, []),
        ranks=rank_lines(engine) if is_done else [],
    )


def refused(engine: Engine, op_id: str, reason: str) -> ScaleState:
    """The answer to an operation that never began."""
    return ScaleState(op_id, "ABORTED", reason, len(engine.mesh.units), [], [], [])


def rank_lines(engine: Engine) -> list[str]:
    """One line per member: what runs where."""
    lines = []
    for rank, place in sorted(engine.mesh.seats.items()):
        ready = engine.executor.ready[rank]
        where = f"pp {place.pp}, dp {place.dp}, tp {place.tp}"
        lines.append(f"rank {rank} ({where}) node {ready.node} pid {ready.pid} {ready.device}")
    return lines


def _row_bytes(config: EngineConfig) -> list[int]:
    """Of one expert of each MoE layer."""
    itemsize, hidden_size = ITEMSIZE[config.dtype], config.model.hidden_size
    return [expert_parameter_count(spec.experts, hidden_size) * itemsize for spec in moe_specs(config.model)]


def _stage(config: EngineConfig, data: int, stage: int) -> StageBytes:
    assert config.experts is not None, "only expert groups change"
    shape = MeshShape(pp=config.shape.pp, dp=data, tp=config.shape.tp)
    needs = stage_bytes(
        config.model,
        shape,
        stage,
        config.stage_layers[stage],
        ITEMSIZE[config.dtype],
        config.kv.block_size,
        Batch(config.max_batch_tokens, config.max_sequences),
        config.experts.slots_per_rank,
    )
    sizes = _row_bytes(config)
    experts = sum(config.experts.slots_of(layer) * sizes[layer] for layer in config.experts.layers_of(stage))
    return StageBytes(needs.weights - experts, experts, needs.workspace, config.kv.num_blocks * needs.block)
