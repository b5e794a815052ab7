"""The keys a user can write. A new one is a visible line here, and a promise to keep."""

from phalanx.deploy.config import ClusterConfig
from phalanx.deploy.fields import keys

KEYS = """
model.path
model.dtype
model.name
ray.address
ray.nodes
ray.placement_timeout
device
replicas
parallel.tensor
parallel.pipeline
parallel.data
parallel.stage_layers
scheduler.max_batch_tokens
scheduler.max_sequences
scheduler.max_model_len
scheduler.max_queue
kv.gpu_fraction
kv.num_blocks
kv.block_size
kv.cpu_memory
kv.prefix_cache
moe.dispatch
moe.exact
moe.redundant_experts
moe.node_size
moe.on_rank_loss
moe.rebalance.interval_steps
moe.rebalance.max_moved
moe.capacity.factor
moe.capacity.min_capacity
moe.capacity.priority
moe.capacity.overflow
server.listen
server.metrics
server.engine_listen
server.drain
server.detach_grace
server.max_message
workers.threads
kernels
"""


def test_the_keys_are_frozen() -> None:
    assert keys(ClusterConfig) == KEYS.split()
