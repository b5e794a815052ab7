"""Tables of rotary position embeddings.

Source: RoFormer (arXiv:2104.09864); scaling: position interpolation (arXiv:2306.15595), YaRN (arXiv:2309.00071) sec. 3,
Llama 3.1's frequency bands. The fp32 order of operations follows transformers, so that tables are equal bit by bit or
nearly so.
"""

import math

import torch
from torch import Tensor

from phalanx.errors import ConfigError
from phalanx.models.spec import RopeSpec


def cos_sin_table(spec: RopeSpec, max_model_len: int, device: torch.device) -> Tensor:
    """Cosines and sines of every position.

    Args:
        spec: of one layer kind.
        max_model_len: positions to cover.
        device: of the result.

    Returns:
        (max_model_len, rotary_dim) fp32, rotary_dim / 2 cosines then rotary_dim / 2 sines.

    Raises:
        ConfigError: dynamic scaling past the original length. There the frequencies depend on the length of the
            longest sequence of a batch, so a cached key would have to be rotated again.
    """
    if spec.scaling == "dynamic" and max_model_len > spec.original_max_position:
        raise ConfigError(
            f"rope scaling 'dynamic' cannot reach max_model_len ({max_model_len}): its frequencies change with the "
            f"length past {spec.original_max_position}; use max_model_len: {spec.original_max_position} or less"
        )
    angles = torch.outer(torch.arange(max_model_len, dtype=torch.float32), inverse_frequencies(spec))
    factor = spec.attention_factor
    return torch.cat([angles.cos() * factor, angles.sin() * factor], dim=-1).to(device)


def inverse_frequencies(spec: RopeSpec) -> Tensor:
    """(rotary_dim / 2) fp32, radians per token of each pair of channels."""
    exponents = torch.arange(0, spec.rotary_dim, 2, dtype=torch.float32) / spec.rotary_dim
    periods: Tensor = spec.theta**exponents
    if spec.scaling == "linear":
        return 1.0 / periods / spec.factor
    if spec.scaling == "llama3":
        return _llama3(spec, 1.0 / periods)
    if spec.scaling == "yarn":
        return _yarn(spec, periods)
    return 1.0 / periods


def _llama3(spec: RopeSpec, frequencies: Tensor) -> Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    wavelengths = 2 * math.pi / frequencies
    original = spec.original_max_position
    kept = (original / wavelengths - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)
    between = (1 - kept) * frequencies / spec.factor + kept * frequencies
    long = torch.where(wavelengths > original / spec.low_freq_factor, frequencies / spec.factor, between)
    return torch.where(wavelengths < original / spec.high_freq_factor, frequencies, long)


def _yarn(spec: RopeSpec, periods: Tensor) -> Tensor:
    """Channels with over `beta_fast` turns in the original length are kept, under `beta_slow` stretched by `factor`."""

    def channel(turns: float) -> float:
        dim = spec.rotary_dim
        return dim * math.log(spec.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(spec.theta))

    low, high = channel(spec.beta_fast), channel(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.rotary_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(spec.rotary_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (spec.factor * periods) * (1 - kept) + 1.0 / periods * kept
