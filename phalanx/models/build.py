"""What the parts of a decoder share while they are built."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from phalanx.kernels.registry import bind
from phalanx.models.rope import cos_sin_table
from phalanx.models.spec import RopeSpec
from phalanx.moe.group import ExpertGroup
from phalanx.parallel.mesh import Mesh


class Ops(NamedTuple):
    """The kernels of a decoder, bound once; their references in `phalanx.kernels` document the arguments."""

    add_rms_norm: Callable[..., tuple[Tensor, Tensor]]
    qkv_prologue: Callable[..., Tensor]
    paged_attention: Callable[..., Tensor]
    act_mul: Callable[..., Tensor]


class LinearOptions(TypedDict):
    """Keyword arguments of every linear layer."""

    dtype: torch.dtype
    device: torch.device
    choose: Mapping[str, str]


class BuildContext:
    """Mesh, sizes, kernels and the rope tables that layers of one kind share.

    Args:
        mesh: of this rank.
        hidden_size: of the model.
        device: of weights and tables.
        dtype: of weights and activations.
        max_model_len: positions the rope tables cover.
        choose: kernel name -> implementation name.
        experts: this rank's place in the expert group of the stage; None = there are no experts.
    """

    def __init__(
        self,
        mesh: Mesh,
        hidden_size: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        max_model_len: int,
        choose: Mapping[str, str],
        experts: ExpertGroup | None = None,
    ) -> None:
        self.mesh = mesh
        self.experts = experts
        self.hidden_size = hidden_size
        self.device = device
        self.max_model_len = max_model_len
        self.linear: LinearOptions = {"dtype": dtype, "device": device, "choose": choose}
        bound: dict[str, Any] = {name: bind(name, device=device, dtype=dtype, choose=choose) for name in Ops._fields}
        self.ops = Ops(**bound)
        self._rope_tables: dict[RopeSpec, Tensor] = {}

    def rope_table(self, spec: RopeSpec) -> Tensor:
        """The cosine-sine table of a layer kind, made once. (max_model_len, rotary_dim) fp32."""
        if spec not in self._rope_tables:
            self._rope_tables[spec] = cos_sin_table(spec, self.max_model_len, self.device)
        return self._rope_tables[spec]
