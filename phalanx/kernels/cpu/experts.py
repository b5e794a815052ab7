"""C++ experts: one parallel region per call; a row's bits depend neither on the rows beside it nor on the threads."""

from ctypes import Structure, byref, c_float, c_int, c_long, c_void_p

import torch
from torch import Tensor, get_num_threads

from phalanx.errors import StepError
from phalanx.kernels import memory
from phalanx.kernels.cpu import library
from phalanx.kernels.expert_shape import ACTIVATIONS, ExpertShape

PAD = 32  # experts.cpp


class _CShape(Structure):
    """`ExpertShape` of experts.cpp."""

    _fields_ = (
        ("hidden", c_long),
        ("inner", c_long),
        ("num_slots", c_long),
        ("row_bytes", c_long),
        ("activation", c_int),
        ("bias", c_int),
        ("alpha", c_float),
        ("limit", c_float),
    )


def refuses(shape: ExpertShape, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the C++ experts cannot compute such a layer, or None."""
    if device.type != "cpu":
        return f"the weights are on {device.type}"
    for name, size in (("hidden", shape.hidden_size), ("inner", shape.intermediate_size)):
        if size * dtype.itemsize % 4:
            return f"its {name} rows ({size} of {dtype}) are not whole 32-bit words"
    return library.refuses(dtype)


class CppExperts:
    """See `Experts`; a row of storage is the panels of gate and up, those of down, then fp32 biases (experts.cpp)."""

    impl = "cpp"
    batch_invariant = True

    def __init__(self, shape: ExpertShape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype = shape, dtype
        suffix = library.SUFFIX[dtype]
        self._c_shape = _CShape(
            shape.hidden_size,
            shape.intermediate_size,
            shape.num_slots,
            0,
            ACTIVATIONS.index(shape.activation),
            shape.bias,
            shape.alpha,
            shape.limit,
        )
        self._shape = byref(self._c_shape)
        self._c_shape.row_bytes = library.function(f"experts_row_bytes_{suffix}", (c_void_p,), c_long)(self._shape)
        self._pack = library.function(f"experts_pack_{suffix}", (*(c_void_p,) * 6, c_int))
        self._call = library.function(f"experts_{suffix}", (*(c_void_p,) * 9, *(c_long,) * 2, c_int), c_long)
        self.rows = memory.empty((shape.num_slots, self._c_shape.row_bytes), torch.uint8, device)
        self.rows.zero_()

    def load(
        self,
        slot: int,
        gate_up: Tensor,
        down: Tensor,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> None:
        """See `Experts.load`."""
        weights = [weight.detach().to(self.dtype).contiguous() for weight in (gate_up, down)]
        biases = [None if b is None else b.detach().float().contiguous() for b in (gate_up_bias, down_bias)]
        pointers = (None if tensor is None else tensor.data_ptr() for tensor in (*weights, *biases))
        self._pack(self._shape, self.rows[slot].data_ptr(), *pointers, get_num_threads())

    def forward(self, x_RD: Tensor, slots_RK: Tensor, weights_RK: Tensor) -> Tensor:
        """See `Experts.forward`."""
        out = torch.empty(x_RD.shape, dtype=torch.float32)
        self._run(x_RD, slots_RK, weights_RK.contiguous(), out)
        return out

    def forward_pairs(self, x_RD: Tensor, slots_RK: Tensor) -> Tensor:
        """See `Experts.forward_pairs`."""
        return self._run(x_RD, slots_RK, None, None)

    def _run(self, x_RD: Tensor, slots_RK: Tensor, weights_RK: Tensor | None, out: Tensor | None) -> Tensor:
        """The outputs of all pairs, and their weighted sum in `out` if it is given."""
        assert (x_RD.dtype, slots_RK.dtype) == (self.dtype, torch.int32)
        assert weights_RK is None or weights_RK.dtype == torch.float32
        x_RD, slots_RK = x_RD.contiguous(), slots_RK.contiguous()
        gathered = torch.empty((slots_RK.numel(), self.shape.hidden_size + PAD), dtype=self.dtype)
        inner = torch.empty((slots_RK.numel(), self.shape.intermediate_size + PAD), dtype=self.dtype)
        pairs = torch.empty((slots_RK.numel(), self.shape.hidden_size), dtype=self.dtype)
        pointers = (None if t is None else t.data_ptr() for t in (x_RD, slots_RK, weights_RK, self.rows))
        buffers = (t.data_ptr() for t in (gathered, inner, pairs))
        target = None if out is None else out.data_ptr()
        count = self._call(self._shape, *pointers, *buffers, target, *slots_RK.shape, get_num_threads())
        if count < 0:
            raise StepError(f"experts: a slot of the step is past the last of {self.shape.num_slots}")
        return pairs[:count]
