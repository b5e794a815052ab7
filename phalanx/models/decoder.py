"""The one decoder: everything that differs between model families is a value in `DecoderConfig`.

The residual stream travels as a pair `(x, residual)` whose sum it is, so that the add is fused into the next norm;
`residual` None means that `x` is the stream. Between stages, and before a layer without a first norm, the sum is made.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from phalanx.errors import ConfigError
from phalanx.kernels.experts import Experts
from phalanx.models.attention import Attention
from phalanx.models.batch import ForwardBatch
from phalanx.models.build import BuildContext
from phalanx.models.mla import MlaAttention
from phalanx.models.mlp import Mlp
from phalanx.models.moe import MoeBlock, alone
from phalanx.models.sizes import kv_tile
from phalanx.models.spec import DecoderConfig, LayerSpec, MlaSpec
from phalanx.moe.group import ExpertGroup
from phalanx.moe.spec import MoeSpec
from phalanx.parallel.embedding import VocabParallelEmbedding, VocabParallelHead, vocabulary_rows
from phalanx.parallel.mesh import Mesh
from phalanx.parallel.parameter import Parameter, replicated


class Norm:
    """RMS norm with an fp32 weight.

    Args:
        eps: added to the mean square.
        unit_offset: the checkpoint holds `w - 1`.
        context: what all parts of a decoder share.
    """

    def __init__(self, eps: float, unit_offset: bool, context: BuildContext) -> None:
        self.weight = replicated(
            (context.hidden_size,), dtype=torch.float32, device=context.device, unit_offset=unit_offset
        )
        self._eps = eps
        self._add_rms_norm = context.ops.add_rms_norm

    def __call__(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Normalise the stream `x + residual`; returns the normalised rows and the stream, both (T, hidden)."""
        return self._add_rms_norm(x, residual, self.weight.tensor, self._eps)


class DecoderLayer:
    """Attention and feed-forward, each with optional norms before and after it.

    Args:
        spec: of this layer.
        layer: index into the pool's layers.
        moe_layer: index among the mixture-of-experts layers of the stage; matters only if this is one.
        context: what all parts of a decoder share.
    """

    def __init__(self, spec: LayerSpec, layer: int, moe_layer: int, context: BuildContext) -> None:
        norms = spec.norms
        places = ("attn_in", "attn_out", "mlp_in", "mlp_out")
        self.norms = {name: Norm(norms.eps, norms.unit_offset, context) for name in places if getattr(norms, name)}
        self.attention: Attention | MlaAttention
        if isinstance(spec.attention, MlaSpec):
            self.attention = MlaAttention(spec.attention, layer, context)
        else:
            self.attention = Attention(spec.attention, norms, layer, context)
        self.mlp: Mlp | MoeBlock
        if isinstance(spec.mlp, MoeSpec):
            self.mlp = MoeBlock(spec.mlp, moe_layer, context)
        else:
            self.mlp = Mlp(spec.mlp, context)

    def parameters(self) -> dict[str, Parameter]:
        """What the checkpoint must fill."""
        parameters = {f"{name}.weight": norm.weight for name, norm in self.norms.items()}
        parameters |= {f"attention.{name}": parameter for name, parameter in self.attention.parameters().items()}
        return parameters | {f"mlp.{name}": parameter for name, parameter in self.mlp.parameters().items()}

    def finalize(self) -> None:
        """Pack the weights; call once, after loading."""
        self.attention.finalize()
        self.mlp.finalize()

    def __call__(self, x: Tensor, residual: Tensor | None, batch: ForwardBatch, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Map the stream to the stream, both as `(x, residual)`."""
        y, stream = self._enter("attn_in", x, residual)
        x = self._leave("attn_out", self.attention(y, batch, kv))
        y, stream = self._enter("mlp_in", x, stream)
        return self._leave("mlp_out", self.mlp(y, batch)), stream

    def _enter(self, place: str, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """The block's input, and the stream it will be added to."""
        norm = self.norms.get(place)
        if norm is not None:
            return norm(x, residual)
        stream = _sum(x, residual)
        return stream, stream

    def _leave(self, place: str, x: Tensor) -> Tensor:
        norm = self.norms.get(place)
        return x if norm is None else norm(x, None)[0]


class Decoder:
    """One pipeline stage of a decoder-only model, or the whole of it.

    Build, fill `parameters()`, `finalize()`, then call `forward` under `torch.inference_mode()`. `loading.load_model`
    does the first three.

    Args:
        config: of the whole model.
        mesh: of this rank; its tp axis shards the weights.
        device: of weights and activations.
        dtype: of weights, activations and KV.
        layer_range: this stage's layers [start, stop).
        max_model_len: longest sequence, tokens.
        choose: kernel name -> implementation name; absent = the best that supports the device.
        experts: this rank's place in the expert group of its stage; None = there are no experts, or the stage is one
            rank, which then holds all of them.

    Raises:
        ConfigError: the tensor axis does not divide the model, `max_model_len` is out of reach, or experts have to be
            spread over several ranks and no group says how.
    """

    def __init__(
        self,
        config: DecoderConfig,
        mesh: Mesh,
        *,
        device: torch.device,
        dtype: torch.dtype,
        layer_range: tuple[int, int],
        max_model_len: int,
        choose: Mapping[str, str] | None = None,
        experts: ExpertGroup | None = None,
    ) -> None:
        start, stop = layer_range
        if not 0 <= start < stop <= len(config.layers):
            raise ConfigError(f"layer range [{start}, {stop}) is not part of a model of {len(config.layers)} layers")
        moe_specs = config.moe_specs(layer_range)
        context = BuildContext(
            mesh,
            config.hidden_size,
            device=device,
            dtype=dtype,
            max_model_len=max_model_len,
            choose=choose or {},
            experts=experts or (alone(moe_specs, mesh, device, choose) if moe_specs else None),
        )
        self.config = config
        self.layer_range = layer_range
        self.is_first = start == 0
        self.is_last = stop == len(config.layers)
        self._kv_tile = kv_tile(config, mesh.tp.size, layer_range)
        self.layers = [
            DecoderLayer(spec, i, len(config.moe_specs((start, start + i))), context)
            for i, spec in enumerate(config.layers[start:stop])
        ]
        self._moe_blocks = [layer.mlp for layer in self.layers if isinstance(layer.mlp, MoeBlock)]
        self.embedding: VocabParallelEmbedding | None = None
        self.norm: Norm | None = None
        self.head: VocabParallelHead | None = None
        rows = vocabulary_rows(config.vocab_size, config.hidden_size, mesh.tp, dtype=dtype, device=device)
        if self.is_first:
            self.embedding = VocabParallelEmbedding(rows, mesh.tp)
        if self.is_last:
            self.norm = Norm(config.norm_eps, config.norm_unit_offset, context)
            if self.is_first and not config.tied_head:
                rows = vocabulary_rows(config.vocab_size, config.hidden_size, mesh.tp, dtype=dtype, device=device)
            self.head = VocabParallelHead(rows, config.vocab_size, mesh.tp, choose=context.linear["choose"])
        # transformers rounds the factor to the weight's dtype before the product.
        scale = config.embed_scale
        self._embed_scale = None if scale is None else torch.tensor(scale, dtype=dtype, device=device)

    def parameters(self) -> dict[str, Parameter]:
        """What the checkpoint must fill, by the names of `weights`; a tied matrix appears under both of its names."""
        parameters = {}
        if self.embedding is not None:
            parameters["embedding.weight"] = self.embedding.weight
        if self.head is not None and self.norm is not None:
            parameters["norm.weight"] = self.norm.weight
            parameters |= {f"head.{name}": parameter for name, parameter in self.head.parameters().items()}
            if self.config.tied_head and self.head.weight is not None:
                parameters["embedding.weight"] = self.head.weight
        for index, layer in enumerate(self.layers, self.layer_range[0]):
            parameters |= {f"layers.{index}.{name}": parameter for name, parameter in layer.parameters().items()}
        return parameters

    def finalize(self) -> None:
        """Pack every linear weight for the device and drop the plain one; call once, after loading."""
        for layer in self.layers:
            layer.finalize()
        if self.head is not None:
            self.head.finalize()

    def kv_shape(self, num_blocks: int, block_size: int) -> tuple[int, int, int, int, int, int]:
        """Shape of this rank's KV pool: (blocks, layers of the stage, 2, local kv heads, block size, head dim).

        Latent attention holds one row per token, which is key and value: (blocks, layers, 1, 1, block size, width).
        """
        parts, kv_heads, head_dim = self._kv_tile
        return (num_blocks, len(self.layers), parts, kv_heads, block_size, head_dim)

    @property
    def experts(self) -> list[Experts]:
        """This rank's slots of each mixture-of-experts layer of the stage, in order; after `finalize`."""
        return [block.experts for block in self._moe_blocks]

    def take_num_dropped(self) -> int:
        """Choices dropped by a capacity limit since the last call, all layers together; waits for the device."""
        dropped = [block.take_num_dropped() for block in self._moe_blocks]
        return int(torch.stack(dropped).sum()) if dropped else 0

    def forward(self, batch: ForwardBatch, kv: Tensor, hidden_states: Tensor | None = None) -> Tensor:
        """Run this stage over T tokens; T = 0 and N = 0 are legal.

        Args:
            batch: of the step, the same on every rank of the tensor axis.
            kv: this rank's pool, `kv_shape`, the model's dtype; the new keys and values are written into it.
            hidden_states: (T, hidden) from the previous stage; None on the first.

        Returns:
            The last stage: logits (N, vocab) fp32 of the `sample_rows`, whole on every rank. Others: hidden states
            (T, hidden) for the next stage, a tensor nobody else writes.
        """
        if self.embedding is not None:
            hidden_states = self.embedding(batch.token_ids)
            if self._embed_scale is not None:
                hidden_states = hidden_states * self._embed_scale
        if hidden_states is None:
            raise ConfigError(f"stage of layers {self.layer_range} needs the hidden states of the previous stage")
        x, residual = hidden_states, None
        for layer in self.layers:
            x, residual = layer(x, residual, batch, kv)
        if self.norm is None or self.head is None:
            return _sum(x, residual)
        return self._logits(x[batch.sample_rows], None if residual is None else residual[batch.sample_rows])

    def _logits(self, x: Tensor, residual: Tensor | None) -> Tensor:
        assert self.norm is not None
        assert self.head is not None
        logits = self.head(self.norm(x, residual)[0])
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)


def _sum(x: Tensor, residual: Tensor | None) -> Tensor:
    return x if residual is None else x + residual
