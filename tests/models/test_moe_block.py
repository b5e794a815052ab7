"""The mixture-of-experts block of every family against that of transformers, fp32, on redrawn weights. Runs in 10 s."""

import functools
import hashlib
import types

import pytest
import torch

from phalanx import plugins
from phalanx.errors import ConfigError
from phalanx.models.build import BuildContext
from phalanx.models.hf_config import FAMILY, read_config
from phalanx.models.loading import load_model
from phalanx.models.moe import MoeBlock, alone
from phalanx.moe.group import EpStep, ExpertGroup
from phalanx.moe.placement.linear import linear
from phalanx.moe.spec import CapacitySpec, ExpertSpec, MoeSpec, RouterSpec, SharedSpec
from phalanx.parallel.group import Group
from phalanx.parallel.mesh import Mesh, MeshShape
from phalanx.parallel.rendezvous import single
from phalanx.parallel.topology import EpTopology
from tests.support import tiny

CPU = torch.device("cpu")
TOLERANCE = 1e-5


def has_experts(family):
    module = plugins.load("models", family, FAMILY)
    return bool(module.decoder_config(module.TINY).moe_layers)


FAMILIES = [family for family in tiny.family_names() if has_experts(family)]


@pytest.fixture(scope="module")
def blocks_of(checkpoints):
    """`(family, exact, overrides) -> [(our block, block of transformers)]`, one pair per layer with experts."""

    @functools.cache
    def make(family, exact=True, **overrides):
        path = tiny.make_checkpoint(family, checkpoints, **overrides)
        config = read_config(path)
        num_layers = len(config.layers)
        num_experts = [spec.router.num_experts for spec in config.moe_specs((0, num_layers))]
        placement = linear(num_experts, 1, max(num_experts))
        slots = placement.slots_per_rank
        group = ExpertGroup(EpTopology.uniform(1, 1), 0, placement.layers, slots, exact=exact, device=CPU)
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


def batch(num_tokens, ep=None):
    """Blocks read nothing else of a batch."""
    return types.SimpleNamespace(num_tokens=num_tokens, ep=ep)


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


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_a_row_depends_on_no_other(family, blocks_of):
    """Bits, in any company; so results do not depend on how a batch was put together."""
    for ours, _ in blocks_of(family):
        x = rows(33)
        together = ours(x, batch(33))
        for start, stop in ((0, 1), (3, 10), (10, 33)):
            assert torch.equal(ours(x[start:stop].clone(), batch(stop - start)), together[start:stop])


def random_block(spec, values):
    """A block by itself; parameters of equal names get equal values."""
    experts = alone([spec], single(CPU), CPU)
    context = BuildContext(
        single(CPU), 64, device=CPU, dtype=torch.float32, max_model_len=8, choose={}, experts=experts
    )
    block = MoeBlock(spec, 0, context)
    for name, parameter in block.parameters().items():
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])
        parameter.tensor.normal_(std=0.2, generator=torch.Generator().manual_seed(seed))
        values[name] = parameter.tensor.clone()
    block.finalize()
    return block


@torch.inference_mode()
def test_pyramid_residual():
    """`c0 * routed + c1 * shared`, the weights a softmax of a linear layer of the input."""
    router, experts = RouterSpec(num_experts=5, top_k=2), ExpertSpec(intermediate_size=24)
    shared = SharedSpec(intermediate_size=40)
    x, values = rows(11), {}
    routed = random_block(MoeSpec(router=router, experts=experts), values)(x, batch(11))
    both = random_block(MoeSpec(router=router, experts=experts, shared=shared), values)(x, batch(11))
    mixed = random_block(MoeSpec(router=router, experts=experts, shared=shared, residual=True), values)(x, batch(11))
    logits = x @ values["coefficients.weight"].T + values["coefficients.bias"]
    first, second = logits.softmax(-1).split(1, dim=-1)
    torch.testing.assert_close(mixed, first * routed + second * (both - routed), atol=TOLERANCE, rtol=0)


@torch.inference_mode()
def test_capacity_drops_and_counts():
    """40 equal tokens want one expert of 5, which takes ceil(40 / 5) of them; the others get nothing from experts."""
    spec = MoeSpec(
        router=RouterSpec(num_experts=5, top_k=1),
        experts=ExpertSpec(intermediate_size=24),
        capacity=CapacitySpec(factor=1.0),
    )
    block, x = random_block(spec, {}), rows(1).repeat(40, 1)
    free = block(x, batch(40))
    limited = block(x, batch(40, EpStep("local", 40, scope_T=torch.zeros(40, dtype=torch.int64))))
    assert torch.equal(limited[:8], free[:8])
    assert not limited[8:].any()
    assert [int(block.take_num_dropped()) for _ in range(2)] == [32, 0]


def test_several_ranks_need_a_group():
    mesh = Mesh(shape=MeshShape(dp=2), rank=0, device=CPU, tp=Group())
    spec = MoeSpec(router=RouterSpec(num_experts=4, top_k=1), experts=ExpertSpec(intermediate_size=8))
    with pytest.raises(ConfigError, match="experts are spread over the 2 ranks of a stage; give their expert group"):
        alone([spec], mesh, CPU)
