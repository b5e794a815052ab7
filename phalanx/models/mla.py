"""Multi-head latent attention by weight absorption, heads sharded over the tensor axis.

The pool holds one row `latent | rotated key part` per token, shared by all heads. With a head's `k = W_k latent` and
`v = W_v latent`, its score is `(W_k.T q) . latent` and its output `W_v (sum p latent)`: both products move to the
query's side, and attention runs with one kv head whose value is the latent part of its key.

Source: DeepSeek-V2 (arXiv:2405.04434) sec. 2.1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from phalanx.models.batch import ForwardBatch
from phalanx.models.build import BuildContext
from phalanx.models.spec import MlaSpec
from phalanx.parallel.linear import ColumnParallelLinear, RowParallelLinear
from phalanx.parallel.parameter import WHOLE, Parameter, Segment, replicated
from phalanx.parallel.partition import shard, whole

LATENT_EPS = 1e-6
"""Of the norms of both latents: transformers leaves them at the default, whatever `rms_norm_eps` is."""

TILE = 8
"""Rows and columns of the products per head are padded to it: the bits of a row then depend on no other row."""


class MlaAttention:
    """Query, latent -> norms, rope, latent into the pool -> attention -> output projection.

    Args:
        spec: global sizes.
        layer: index into the pool's layers (counted from the stage's first).
        context: what all parts of a decoder share.
    """

    def __init__(self, spec: MlaSpec, layer: int, context: BuildContext) -> None:
        tp, hidden_size = context.mesh.tp, context.hidden_size
        self._spec, self._layer, self._ops = spec, layer, context.ops
        self._cos_sin = context.rope_table(spec.rope)
        heads = shard("num_heads", spec.num_heads, tp.rank, tp.size)
        self._num_heads = heads.size
        query = {WHOLE: heads.times(spec.nope_dim + spec.rope_dim)}
        self._linears: dict[str, ColumnParallelLinear | RowParallelLinear] = {}
        self._norms: dict[str, Parameter] = {}
        if spec.q_lora_rank is None:
            self._linears["q_proj"] = ColumnParallelLinear(hidden_size, query, **context.linear)
        else:
            latent = {WHOLE: whole(spec.q_lora_rank)}
            self._linears["q_a_proj"] = ColumnParallelLinear(hidden_size, latent, bias=spec.bias, **context.linear)
            self._linears["q_b_proj"] = ColumnParallelLinear(spec.q_lora_rank, query, **context.linear)
            self._norms["q_a_norm"] = replicated((spec.q_lora_rank,), dtype=torch.float32, device=context.device)
        row = {WHOLE: whole(spec.kv_lora_rank + spec.rope_dim)}
        self._linears["kv_a_proj"] = ColumnParallelLinear(hidden_size, row, bias=spec.bias, **context.linear)
        self._norms["kv_a_norm"] = replicated((spec.kv_lora_rank,), dtype=torch.float32, device=context.device)
        part = heads.times(spec.nope_dim + spec.value_dim)
        self._kv_b_proj: Parameter | None = Parameter(
            (part.size, spec.kv_lora_rank),
            {WHOLE: Segment((part.total, spec.kv_lora_rank), 0, part)},
            dtype=context.linear["dtype"],
            device=context.device,
        )
        self._linears["o_proj"] = RowParallelLinear(
            heads.times(spec.value_dim), hidden_size, tp, bias=spec.bias, **context.linear
        )
        self._key_up = self._value_up = self._kv_b_proj.tensor

    def parameters(self) -> dict[str, Parameter]:
        """What the checkpoint must fill."""
        parameters = {
            f"{module}.{name}": parameter
            for module, linear in self._linears.items()
            for name, parameter in linear.parameters().items()
        }
        if self._kv_b_proj is not None:
            parameters["kv_b_proj.weight"] = self._kv_b_proj
        return parameters | {f"{name}.weight": norm for name, norm in self._norms.items()}

    def finalize(self) -> None:
        """Pack the weights; call once, after loading."""
        for linear in self._linears.values():
            linear.finalize()
        if self._kv_b_proj is not None:
            both = self._kv_b_proj.tensor.view(self._num_heads, -1, self._spec.kv_lora_rank)
            key_up, value_up = both.split([self._spec.nope_dim, self._spec.value_dim], dim=1)
            self._key_up, self._value_up = _padded(key_up), _padded(value_up.transpose(1, 2))
            self._kv_b_proj = None

    def __call__(self, x: Tensor, batch: ForwardBatch, kv: Tensor) -> Tensor:
        """Map (T, hidden) to (T, hidden); the new latents are written into `kv`, (blocks, layers, 1, 1, block, D)."""
        spec = self._spec
        cos, sin = self._cos_sin[batch.positions].chunk(2, dim=-1)
        self._write_latent(x, cos, sin, batch.slot_mapping, kv)
        q = self._query(x).view(x.shape[0], self._num_heads, spec.nope_dim + spec.rope_dim)
        q_nope, q_rope = q.split([spec.nope_dim, spec.rope_dim], dim=-1)
        q_latent = _per_head(q_nope, self._key_up, spec.kv_lora_rank)
        q_rope = _rotate(q_rope, cos[:, None], sin[:, None], spec.rope.interleaved)
        out = self._ops.paged_attention(
            torch.cat([q_latent, q_rope], dim=-1)[None],
            kv,
            self._layer,
            batch.meta,
            scale=spec.scale,
            window=None,
            softcap=None,
            sinks=None,
        )
        out = out.view(*q_latent.shape[:2], kv.shape[-1])[..., : spec.kv_lora_rank]
        return self._linears["o_proj"](_per_head(out, self._value_up, spec.value_dim).flatten(1))

    def _query(self, x: Tensor) -> Tensor:
        """(T, local heads * (nope + rope))."""
        if self._spec.q_lora_rank is None:
            return self._linears["q_proj"](x)
        return self._linears["q_b_proj"](self._normalised(self._linears["q_a_proj"](x), "q_a_norm"))

    def _normalised(self, x: Tensor, name: str) -> Tensor:
        return self._ops.add_rms_norm(x, None, self._norms[name].tensor, LATENT_EPS)[0]

    def _write_latent(self, x: Tensor, cos: Tensor, sin: Tensor, slot_mapping: Tensor, kv: Tensor) -> None:
        spec = self._spec
        latent, k_rope = self._linears["kv_a_proj"](x).split([spec.kv_lora_rank, spec.rope_dim], dim=-1)
        latent = self._normalised(latent.contiguous(), "kv_a_norm")
        rows = torch.cat([latent, _rotate(k_rope, cos, sin, spec.rope.interleaved)], dim=-1)
        # A padding row writes back what is already in slot 0 of the null block, so no row has to be selected (no sync).
        pool, block_size = kv[:, self._layer, 0, 0], kv.shape[4]
        slots = slot_mapping.clamp(min=0)
        block, offset = slots // block_size, slots % block_size
        pool[block, offset] = torch.where((slot_mapping < 0)[:, None], pool[block, offset], rows)


def _padded(weight: Tensor) -> Tensor:
    """(heads, in, out) with columns of zeros up to a multiple of `TILE`."""
    return F.pad(weight, (0, -weight.shape[2] % TILE)).contiguous()


def _per_head(x: Tensor, weight: Tensor, width: int) -> Tensor:
    """(T, heads, in) x (heads, in, padded width) -> (T, heads, width)."""
    rows = F.pad(x.transpose(0, 1), (0, 0, 0, -x.shape[0] % TILE))
    return torch.bmm(rows, weight)[:, : x.shape[0], :width].transpose(0, 1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate all channels; the halves of the result come one after the other, for queries and keys alike."""
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    a, b = a.float(), b.float()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
