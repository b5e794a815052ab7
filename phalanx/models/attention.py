"""Grouped-query attention over the paged KV pool, heads sharded over the tensor axis."""

import torch
from torch import Tensor

from phalanx.models.batch import ForwardBatch
from phalanx.models.build import BuildContext
from phalanx.models.spec import AttentionSpec, NormSpec
from phalanx.parallel.linear import ColumnParallelLinear, RowParallelLinear
from phalanx.parallel.parameter import Parameter, replicated, sharded_vector
from phalanx.parallel.partition import shard, shard_or_replicate


class Attention:
    """qkv projection -> norm, rope, K/V into the pool -> attention -> output projection.

    With more ranks than kv heads, several ranks hold the same kv head and each a part of its query heads.

    Args:
        spec: global sizes and variant.
        norms: eps and unit offset of the q/k norms.
        layer: index into the pool's layers (counted from the stage's first).
        context: what all parts of a decoder share.
    """

    def __init__(self, spec: AttentionSpec, norms: NormSpec, layer: int, context: BuildContext) -> None:
        tp = context.mesh.tp
        heads = shard("num_heads", spec.num_heads, tp.rank, tp.size)
        kv_heads = shard_or_replicate("num_kv_heads", spec.num_kv_heads, tp.rank, tp.size)
        self._spec = spec
        self._layer = layer
        self._eps = norms.eps
        self._tp = tp
        self._ops = context.ops
        self._cos_sin = context.rope_table(spec.rope)
        self._q_part = heads.times(spec.head_dim)
        self._kv_part = kv_heads.times(spec.head_dim)
        self._qkv_proj = ColumnParallelLinear(
            context.hidden_size,
            {"q": self._q_part, "k": self._kv_part, "v": self._kv_part},
            bias=spec.qkv_bias,
            **context.linear,
        )
        self._o_proj = RowParallelLinear(self._q_part, context.hidden_size, tp, bias=spec.o_bias, **context.linear)
        self._q_norm, self._k_norm = self._norm_parameters(norms, context.device)
        self._sinks = sharded_vector(heads, dtype=torch.float32, device=context.device) if spec.sinks else None

    def parameters(self) -> dict[str, Parameter]:
        """What the checkpoint must fill."""
        parameters = {f"qkv_proj.{name}": parameter for name, parameter in self._qkv_proj.parameters().items()}
        parameters |= {f"o_proj.{name}": parameter for name, parameter in self._o_proj.parameters().items()}
        vectors = {"q_norm.weight": self._q_norm, "k_norm.weight": self._k_norm, "sinks": self._sinks}
        return parameters | {name: vector for name, vector in vectors.items() if vector is not None}

    def finalize(self) -> None:
        """Pack the weights; call once, after loading."""
        self._qkv_proj.finalize()
        self._o_proj.finalize()

    def __call__(self, x: Tensor, batch: ForwardBatch, kv: Tensor) -> Tensor:
        """Map (T, hidden) to (T, hidden); the new keys and values are written into `kv`."""
        qkv = self._qkv_proj(x)
        if self._spec.qk_norm == "full":
            self._normalise_full_width(qkv)
        per_head = self._spec.qk_norm == "head"
        q = self._ops.qkv_prologue(
            qkv,
            batch.positions,
            self._cos_sin,
            self._q_norm.tensor if per_head and self._q_norm else None,
            self._k_norm.tensor if per_head and self._k_norm else None,
            batch.slot_mapping,
            kv,
            self._layer,
            self._eps,
            self._spec.rope.interleaved,
        )
        out = self._ops.paged_attention(
            q,
            kv,
            self._layer,
            batch.meta,
            scale=self._spec.scale,
            window=self._spec.window,
            softcap=self._spec.softcap,
            sinks=self._sinks.tensor if self._sinks else None,
        )
        return self._o_proj(out)

    def _norm_parameters(self, norms: NormSpec, device: torch.device) -> tuple[Parameter | None, Parameter | None]:
        if self._spec.qk_norm == "none":
            return None, None
        if self._spec.qk_norm == "head":
            shape = (self._spec.head_dim,)
            return (
                replicated(shape, dtype=torch.float32, device=device, unit_offset=norms.unit_offset),
                replicated(shape, dtype=torch.float32, device=device, unit_offset=norms.unit_offset),
            )
        return (
            sharded_vector(self._q_part, dtype=torch.float32, device=device, unit_offset=norms.unit_offset),
            sharded_vector(self._kv_part, dtype=torch.float32, device=device, unit_offset=norms.unit_offset),
        )

    def _normalise_full_width(self, qkv: Tensor) -> None:
        """RMS norm over all heads of all ranks, in place: the sums of squares meet in one small all-reduce."""
        assert self._q_norm is not None
        assert self._k_norm is not None
        q, k = qkv[:, : self._q_part.size], qkv[:, self._q_part.size :][:, : self._kv_part.size]
        holders = self._tp.size * self._kv_part.size // self._kv_part.total  # ranks that hold the same kv head
        sums = torch.stack([q.float().square().sum(-1), k.float().square().sum(-1) / holders], dim=-1)
        mean = self._tp.all_reduce(sums) / sums.new_tensor([self._q_part.total, self._kv_part.total])
        scale = torch.rsqrt(mean + self._eps)
        q.copy_(q.float() * scale[:, :1] * self._q_norm.tensor)
        k.copy_(k.float() * scale[:, 1:] * self._k_norm.tensor)
