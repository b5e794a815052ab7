"""Checkpoints in mxfp4 and in blocks of fp8: what is read is what transformers makes of them. About 10 s."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor
from transformers.integrations import mxfp4

from phalanx.errors import CheckpointError
from phalanx.models.checkpoint import SINGLE, Checkpoint
from phalanx.models.hf_config import Quantization
from phalanx.models.loading import load_model
from phalanx.models.quantized import plain
from phalanx.parallel.rendezvous import single
from tests.models import drive
from tests.support import tiny

CPU = torch.device("cpu")
BLOCK = (48, 32)
FP8 = Quantization("fp8", BLOCK)
Change = Callable[[dict[str, Tensor], str, torch.Generator], None]


def to_mxfp4(tensors: dict[str, Tensor], key: str, generator: torch.Generator) -> None:
    """Replace experts by random mxfp4 ones; what they are worth is transformers' own word."""
    experts, columns, rows = tensors.pop(key).shape
    blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(121, 126, (experts, rows, columns // 32), generator=generator, dtype=torch.uint8)
    tensors |= {f"{key}_blocks": blocks, f"{key}_scales": scales}


def to_fp8(tensors: dict[str, Tensor], key: str, generator: torch.Generator) -> None:
    """Quantize a matrix, a factor per block."""
    weight = tensors[key].float()
    scales = torch.empty(*(-(-size // step) for size, step in zip(weight.shape, BLOCK, strict=True)))
    for i, j in torch.cartesian_prod(*map(torch.arange, scales.shape)).tolist():
        part = weight[BLOCK[0] * i : BLOCK[0] * (i + 1), BLOCK[1] * j : BLOCK[1] * (j + 1)]
        scales[i, j] = part.abs().max() / 448 * (1 + torch.rand((), generator=generator))
        part /= scales[i, j]
    tensors |= {key: weight.to(torch.float8_e4m3fn), f"{key}_scale_inv": scales}


def dequantized(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The plain checkpoint, in full, by other means than ours."""
    found = {}
    for key, value in tensors.items():
        if key.endswith("_blocks"):
            name = key.removesuffix("_blocks")
            found[name] = mxfp4.convert_moe_packed_tensors(value, tensors[f"{name}_scales"]).float().contiguous()
        elif value.dtype == torch.float8_e4m3fn:
            scales = tensors[f"{key}_scale_inv"]
            found[key] = torch.tensor(
                [
                    [float(x) * float(scales[i // BLOCK[0], j // BLOCK[1]]) for j, x in enumerate(row)]
                    for i, row in enumerate(value.float().tolist())
                ]
            )
        elif not key.endswith(("_scales", "_scale_inv")):
            found[key] = value
    return found


def quantized(family: str, folder: Path, change: Change, pattern: str, config: dict[str, object]) -> tuple[Path, Path]:
    """A checkpoint with some tensors quantized, and its plain twin."""
    overrides = {"intermediate_size": 64} if family == "gpt_oss" else {}
    source = tiny.make_checkpoint(family, folder, **overrides)
    tensors, generator = safetensors.torch.load_file(source / SINGLE), torch.Generator().manual_seed(4)
    for key in [key for key in tensors if re.search(pattern, key)]:
        change(tensors, key, generator)
    small, twin = (Path(shutil.copytree(source, folder / name)) for name in ("quantized", "plain"))
    safetensors.torch.save_file(tensors, small / SINGLE)
    safetensors.torch.save_file(dequantized(tensors), twin / SINGLE, {"format": "pt"})
    hf = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**hf, "quantization_config": config}))
    return small, twin


MXFP4 = ("gpt_oss", to_mxfp4, r"experts\.(gate_up|down)_proj$", {"quant_method": "mxfp4"})
BLOCKS = (
    "deepseek_v3",
    to_fp8,
    r"(self_attn|experts\.\d+|shared_experts)\.\w+_proj(_with_mqa)?\.weight$",
    {"quant_method": "fp8", "weight_block_size": list(BLOCK)},
)


@pytest.mark.parametrize("case", [MXFP4, BLOCKS], ids=["mxfp4", "fp8"])
def test_logits_are_those_of_the_plain_twin(case, tmp_path: Path) -> None:
    family, change, pattern, config = case
    small, twin = quantized(family, tmp_path, change, pattern, config)
    assert (small / SINGLE).stat().st_size < 0.7 * (twin / SINGLE).stat().st_size
    model = tiny.load_hf(twin)
    sequences = torch.randint(1, 200, (2, 21), generator=torch.Generator().manual_seed(1)).tolist()
    got = drive.logits_of(single(CPU), str(small), sequences, "whole")
    expected = torch.cat([tiny.hf_logits(model, ids) for ids in sequences])
    assert (got.view_as(expected) - expected).abs().max() < 1e-4


def test_any_part_can_be_read(tmp_path: Path) -> None:
    """Also one that begins and ends inside a group or a block; ranks read their slices."""
    small, twin = quantized(*MXFP4[:1], tmp_path, *MXFP4[1:])
    expected = safetensors.torch.load_file(twin / SINGLE)
    with Checkpoint(small) as checkpoint:
        stored = next(one for one in plain(checkpoint, Quantization("mxfp4")) if one.key.endswith("gate_up_proj"))
        for index in ((slice(1, 3), slice(0, 64), slice(0, 128)), (slice(0, 1), slice(5, 41), slice(7, 100))):
            assert torch.equal(stored.read(index).float(), expected[stored.key][index])
    small, twin = quantized(*BLOCKS[:1], tmp_path / "fp8", *BLOCKS[1:])
    expected = safetensors.torch.load_file(twin / SINGLE)
    with Checkpoint(small) as checkpoint:
        for stored in plain(checkpoint, FP8):
            if stored.key.endswith("o_proj.weight"):
                for index in ((slice(0, 64), slice(0, 20)), (slice(47, 50), slice(31, 40)), (slice(3, 4), slice(0, 1))):
                    torch.testing.assert_close(stored.read(index), expected[stored.key][index], rtol=1e-6, atol=0)


def test_parts_that_do_not_fit(tmp_path: Path) -> None:
    small, _ = quantized(*BLOCKS[:1], tmp_path, *BLOCKS[1:])
    whole = safetensors.torch.load_file(small / SINGLE)
    key = next(key for key in whole if key.endswith("o_proj.weight"))

    def load() -> None:
        load_model(small, single(CPU), device=CPU, dtype=torch.float32, layer_range=(0, 3), max_model_len=64)

    safetensors.torch.save_file({**whole, f"{key}_scale_inv": torch.ones(3, 3)}, small / SINGLE)
    with pytest.raises(CheckpointError, match=rf"'{re.escape(key)}' .* needs factors \[2, \d\], not \[3, 3\]"):
        load()
    safetensors.torch.save_file({name: x for name, x in whole.items() if name != f"{key}_scale_inv"}, small / SINGLE)
    with pytest.raises(CheckpointError, match=rf"'{re.escape(key)}' is quantized, and '{key}_scale_inv' is missing"):
        load()
