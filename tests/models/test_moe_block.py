"""The mixture-of-experts block of every family against that of transformers, fp32, on redrawn weights. Runs in 10 s."""

import functools

import pytest
import torch

from phalanx import plugins
from phalanx.models.hf_config import FAMILY, read_config
from phalanx.models.loading import load_model
from phalanx.moe.group import ExpertGroup
from phalanx.moe.placement.linear import linear
from phalanx.parallel.rendezvous import single
from phalanx.parallel.topology import EpTopology
from tests.support import tiny

CPU = torch.device("cpu")
TOLERANCE = 1e-5


def has_experts(family):
    module = plugins.load("models", family, FAMILY)
    return bool(module.decoder_config(module.TINY).moe_layers)


FAMILIES = [family for family in tiny.family_names() if has_experts(family)]

# fp32 sigmoid of torch has other bits in the last, incomplete vector of a batch: their router scores depend on T.
SIGMOID = ("deepseek_v3", "glm4_moe")


@pytest.fixture(scope="module")
def blocks_of(checkpoints):
    """`(family, exact, overrides) -> [(our block, block of transformers)]`, one pair per layer with experts."""

    @functools.cache
    def make(family, exact=True, **overrides):
        path = tiny.make_checkpoint(family, checkpoints, **overrides)
        config = read_config(path)
        num_layers = len(config.layers)
        num_experts = [spec.router.num_experts for spec in config.moe_specs((0, num_layers))]
        layers = linear(num_experts, 1, num_experts[0]).layers
        group = ExpertGroup(EpTopology.uniform(1, 1), 0, layers, num_experts[0], exact=exact, device=CPU)
        decoder = load_model(
            path,
            single(CPU),
            device=CPU,
            dtype=torch.float32,
            layer_range=(0, num_layers),
            max_model_len=64,
            experts=group,
        )
        theirs = tiny.load_hf(path).model.layers
        return [(decoder.layers[index].mlp, theirs[index].mlp) for index in config.moe_layers]

    return make


@torch.inference_mode()
def compare(pair, x):
    ours, theirs = pair
    expected = theirs(x[None])
    expected = expected[0] if isinstance(expected, tuple) else expected
    got = ours(x, batch(len(x)))
    torch.testing.assert_close(got, expected.view_as(x), atol=TOLERANCE, rtol=0)


def batch(num_tokens):
    """Blocks read nothing of a batch but this."""

    class Batch:
        ep = None

    Batch.num_tokens = num_tokens
    return Batch


def rows(count, seed=5):
    """Of std 0.5: the redrawn weights would turn rows of std 1 into outputs above 10, whose last bit is 1e-6."""
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(seed)) / 2


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "reduced"])
@pytest.mark.parametrize("family", FAMILIES)
def test_block_equals_transformers(family, exact, blocks_of):
    for pair in blocks_of(family, exact):
        for num_tokens in (1, 2, 37):
            compare(pair, rows(num_tokens))


@pytest.mark.parametrize("family", FAMILIES)
def test_one_expert_per_token(family, blocks_of):
    for pair in blocks_of(family, num_experts_per_tok=1):
        compare(pair, rows(9))


@pytest.mark.parametrize("family", FAMILIES)
def test_all_tokens_to_the_same_experts(family, blocks_of):
    for pair in blocks_of(family, num_experts_per_tok=1):
        compare(pair, rows(1).repeat(40, 1) * torch.linspace(0.999, 1.001, 40)[:, None])


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "reduced"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_no_token(family, exact, blocks_of):
    for ours, _ in blocks_of(family, exact):
        assert ours(rows(0), batch(0)).shape == (0, 64)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in SIGMOID])
@torch.inference_mode()
def test_a_row_depends_on_no_other(family, blocks_of):
    """Bits, in any company; so results do not depend on how a batch was put together."""
    for ours, _ in blocks_of(family):
        x = rows(33)
        together = ours(x, batch(33))
        for start, stop in ((0, 1), (3, 10), (10, 33)):
            assert torch.equal(ours(x[start:stop].clone(), batch(stop - start)), together[start:stop])
