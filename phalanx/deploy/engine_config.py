"""From a deployment's plan to the config of one engine."""

from itertools import accumulate, pairwise

from phalanx.deploy.plan import DeploymentPlan
from phalanx.models.loading import read_config, resolve_path
from phalanx.runtime.engine_config import EngineConfig
from phalanx.runtime.expert_config import resolve_experts
from phalanx.runtime.kv.spec import KVSpec
from phalanx.runtime.memory import ITEMSIZE


def engine_config(plan: DeploymentPlan) -> EngineConfig:
    """The engine's part of a plan; reads the model's config on this node.

    Raises:
        CheckpointError: the checkpoint is not readable here.
    """
    folder = resolve_path(plan.model.path)
    scheduler, kv = plan.scheduler, plan.kv
    model, shape = read_config(folder), plan.parallel.shape
    stages = tuple(pairwise(accumulate(plan.parallel.stage_layers, initial=0)))
    return EngineConfig(
        model_path=str(folder),
        model=model,
        shape=shape,
        stage_layers=stages,
        device=plan.device,
        dtype=plan.model.dtype,
        kv=KVSpec(block_size=kv.block_size, num_blocks=kv.num_blocks, max_model_len=scheduler.max_model_len),
        prefix_cache=kv.prefix_cache,
        max_batch_tokens=scheduler.max_batch_tokens,
        max_sequences=scheduler.max_sequences,
        num_threads=plan.workers.threads,
        kernels=plan.kernels,
        experts=resolve_experts(model, shape, stages, ITEMSIZE[plan.model.dtype], plan.moe.options),
        digest=plan.digest,
    )
