"""Every family against transformers, in fp32, on redrawn tiny checkpoints. Runs in 30 s, layouts in 2 min more.

Both sides are off from fp64 by up to 2e-5 on these models (logits of std 2.5), hence the tolerance.
"""

import dataclasses
from typing import Any

import pytest
import torch

from phalanx import plugins
from phalanx.kernels.cpu import library
from phalanx.models.checkpoint import Checkpoint
from phalanx.models.decoder import Decoder
from phalanx.models.hf_config import EMBEDDED, FAMILY
from phalanx.models.loading import fill, read_config, resolve_path
from phalanx.models.spec import DecoderConfig, LayerSpec
from phalanx.moe.spec import MoeSpec
from phalanx.parallel.mesh import MeshShape
from phalanx.parallel.rendezvous import host_store, single
from tests.models import drive
from tests.support import tiny
from tests.support.ranks import run_mesh

FAMILIES = tiny.family_names()
TOLERANCE = 5e-5
ALONE = single(torch.device("cpu"))
LAYOUTS = {"tp2": MeshShape(tp=2), "tp4": MeshShape(tp=4), "pp2": MeshShape(pp=2), "pp2tp2": MeshShape(pp=2, tp=2)}
DISPATCH = {"tp2": "flat", "tp4": "two_hop", "pp2": "local", "pp2tp2": "allgather"}
MOE_FAMILIES = [name for name in FAMILIES if name.endswith("_moe") or name in ("mixtral", "olmoe", "gpt_oss")]
MOE_FAMILIES += [name for name in FAMILIES if name.startswith("deepseek")]


def test_all_families_are_found():
    expected = {"gemma2", "gemma3_text", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3"}
    expected |= {
        "deepseek_v2",
        "deepseek_v3",
        "glm4_moe",
        "gpt_oss",
        "mixtral",
        "olmoe",
        "qwen2_moe",
        "qwen3_moe",
        "pr_moe",
    }
    assert expected <= set(FAMILIES)


@pytest.mark.parametrize("program", drive.PROGRAMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family, program, oracle_of):
    oracle = oracle_of(family)
    got = drive.logits_of(ALONE, str(oracle.path), oracle.sequences, program)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, oracle.logits, atol=TOLERANCE, rtol=0)


@pytest.mark.skipif(library.load().handle is None, reason=library.load().reason or "built")
@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_and_company_change_no_bit(family, oracle_of):
    """A token's logits depend on the tokens before it and on nothing else, so replayed requests go on as they were."""
    oracle = oracle_of(family)
    whole, chunked = (drive.logits_of(ALONE, str(oracle.path), oracle.sequences, program) for program in drive.PROGRAMS)
    assert torch.equal(whole, chunked)


@pytest.mark.multi
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_do_not_depend_on_the_layout(family, layout, oracle_of):
    oracle, shape = oracle_of(family), LAYOUTS[layout]
    store, address = host_store()
    experts = drive.Experts(address, DISPATCH[layout])
    results = run_mesh(shape, drive.logits_of, str(oracle.path), oracle.sequences, "chunked", experts)
    del store
    last_stage = results[-shape.tp :]
    for logits in last_stage:
        torch.testing.assert_close(logits, oracle.logits, atol=TOLERANCE, rtol=0)
        assert torch.equal(logits, last_stage[0])
    assert results[: -shape.tp] == [None] * (shape.world_size - shape.tp)


@pytest.mark.multi
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "reduced"])
@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_ranks_without_tokens_lend_their_experts(family, exact, oracle_of):
    """The second dp rank has no token in any step, and half of the experts; exact means as if there was one rank."""
    oracle, shape = oracle_of(family), MeshShape(dp=2, tp=1 if exact else 2)
    store, address = host_store()
    experts = drive.Experts(address, "two_hop", exact)
    results = run_mesh(shape, drive.logits_of, str(oracle.path), oracle.sequences, "chunked", experts)
    del store
    torch.testing.assert_close(results[0], oracle.logits, atol=TOLERANCE, rtol=0)
    assert results[shape.tp :] == [None] * shape.tp
    if exact:
        alone = drive.logits_of(ALONE, str(oracle.path), oracle.sequences, "chunked")
        assert torch.equal(results[0], alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_have_a_margin(family, checkpoints):
    """The end-to-end tests compare 48 greedy tokens: they must not be a matter of rounding, nor all the same."""
    model = tiny.load_hf(tiny.make_checkpoint(family, checkpoints))
    tokens, margin = tiny.greedy(model, [5, 17, 99, 3], 48)
    assert margin > 50 * 2e-5
    assert len(set(tokens)) > 8


@pytest.mark.parametrize("family", FAMILIES)
def test_both_spellings_give_the_same_config(family, checkpoints):
    """`TINY` is written as the Hub has it, `save_pretrained` writes transformers 5's names."""
    module = plugins.load("models", family, FAMILY)
    saved = read_config(tiny.make_checkpoint(family, checkpoints))
    assert dataclasses.replace(saved, eos_token_ids=()) == module.decoder_config(module.TINY)


# Every feature a family turns on must show in its logits, or the comparison above proves nothing about it.
ATTENTION = {
    "scale": lambda spec: spec.scale * 1.5,
    "window": lambda spec: None,
    "softcap": lambda spec: None,
    "qk_norm": lambda spec: "none",
    "rope": lambda spec: dataclasses.replace(spec.rope, theta=spec.rope.theta * 2),
    "sinks": lambda spec: False,
}
ROUTER = {
    "normalise": lambda router: "none" if router.normalise == "sum" else "sum",
    "use_bias": lambda router: False,
    "top_groups": lambda router: router.num_groups,
    "scale": lambda router: 1.0,
    "top_k": lambda router: router.top_k - 1,
}
NORMS = {name: lambda spec: False for name in ("attn_in", "attn_out", "mlp_in", "mlp_out", "unit_offset")}
DECODER = {name: lambda config: None for name in ("embed_scale", "logit_softcap")}


def _changed(spec: Any, name: str, change: Any) -> Any:
    return dataclasses.replace(spec, **{name: change(spec)})


def _variants(config: DecoderConfig) -> dict[str, DecoderConfig]:
    """The config with one feature changed in all layers that have it."""
    variants = {name: _changed(config, name, change) for name, change in DECODER.items()}

    def in_layers(change: Any) -> DecoderConfig:
        return dataclasses.replace(config, layers=tuple(change(layer) for layer in config.layers))

    def attention(name: str) -> Any:
        def change(layer: LayerSpec) -> LayerSpec:
            if not hasattr(layer.attention, name):
                return layer
            return dataclasses.replace(layer, attention=_changed(layer.attention, name, ATTENTION[name]))

        return change

    def moe(change: Any) -> Any:
        return lambda layer: (
            dataclasses.replace(layer, mlp=change(layer.mlp)) if isinstance(layer.mlp, MoeSpec) else layer
        )

    def router(name: str) -> Any:
        return lambda spec: dataclasses.replace(spec, router=_changed(spec.router, name, ROUTER[name]))

    def norms(name: str) -> Any:
        return lambda layer: dataclasses.replace(layer, norms=_changed(layer.norms, name, NORMS[name]))

    def scaling(layer: LayerSpec) -> LayerSpec:
        rope = dataclasses.replace(layer.attention.rope, scaling="default")
        return dataclasses.replace(layer, attention=dataclasses.replace(layer.attention, rope=rope))

    variants |= {name: in_layers(attention(name)) for name in ATTENTION}
    variants |= {name: in_layers(norms(name)) for name in NORMS}
    variants |= {name: in_layers(moe(router(name))) for name in ROUTER}
    variants["no shared expert"] = in_layers(moe(lambda spec: dataclasses.replace(spec, shared=None)))
    variants["residual"] = in_layers(moe(lambda spec: dataclasses.replace(spec, residual=False)))
    for name, value in {"limit": 100.0, "alpha": 1.0}.items():
        variants[f"swiglu {name}"] = in_layers(moe(_clamped(name, value)))
    variants["rope scaling"] = in_layers(scaling)
    return {name: variant for name, variant in variants.items() if variant != config}


def _clamped(name: str, value: float) -> Any:
    def change(spec: MoeSpec) -> MoeSpec:
        if spec.experts.activation != "swiglu_clamped":
            return spec
        return dataclasses.replace(spec, experts=dataclasses.replace(spec.experts, **{name: value}))

    return change


@pytest.mark.parametrize("family", FAMILIES)
def test_every_feature_shows(family, oracle_of):
    oracle = oracle_of(family)
    variants = _variants(read_config(oracle.path))
    assert len(variants) >= 3
    for name, config in variants.items():
        decoder = _partly_filled(config, oracle.path, family)
        driver = drive.Driver(decoder, ALONE, oracle.sequences)
        difference = (drive.whole(driver, len(oracle.sequences[0])) - oracle.logits).abs().max()
        assert not difference < 20 * TOLERANCE, f"{family}: {name} does not show ({difference})"


def _partly_filled(config: DecoderConfig, path: Any, family: str) -> Decoder:
    """A decoder with the checkpoint's weights as far as they have a place in it."""
    decoder = Decoder(
        config,
        ALONE,
        device=torch.device("cpu"),
        dtype=torch.float32,
        layer_range=(0, len(config.layers)),
        max_model_len=64,
    )
    module, parameters = plugins.load("models", family, FAMILY), decoder.parameters()

    class Names:
        @staticmethod
        def locate(key: str) -> Any:
            target = module.locate(key)
            return target if target is not None and (target.stacking or target.name in parameters) else None

    with Checkpoint(path) as checkpoint:
        fill(decoder, checkpoint.tensors(), Names)
    decoder.finalize()
    return decoder


@pytest.mark.parametrize("family", FAMILIES)
def test_empty_steps_and_no_samples(family, oracle_of):
    oracle = oracle_of(family)
    driver = drive.Driver(drive.load_stage(str(oracle.path), ALONE), ALONE, oracle.sequences)
    untouched = driver.kv.clone()
    assert driver.step([], "none").shape == (0, oracle.logits.shape[-1])
    assert torch.equal(driver.kv.nan_to_num(), untouched.nan_to_num())
    assert driver.step([(0, 0, 9), (1, 0, 5)], "none").shape == (0, oracle.logits.shape[-1])
    last = driver.step([(0, 9, 1), (1, 5, 3)], "last")
    expected = torch.stack([oracle.logits[0, 9], oracle.logits[1, 7]])
    torch.testing.assert_close(last, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", ["llama", "deepseek_v2"])
def test_padding_rows_write_nothing(family, oracle_of):
    """A row with slot -1 past the last sequence changes neither the pool nor the other rows."""
    oracle = oracle_of(family)
    driver = drive.Driver(drive.load_stage(str(oracle.path), ALONE), ALONE, oracle.sequences)
    batch = driver.batch([(0, 0, 6)])
    pad = torch.zeros(2, dtype=torch.int32)
    padded = dataclasses.replace(
        batch,
        token_ids=torch.cat([batch.token_ids, pad]),
        positions=torch.cat([batch.positions, pad]),
        slot_mapping=torch.cat([batch.slot_mapping, torch.full((2,), -1)]),
        num_tokens=8,
    )
    with torch.inference_mode():
        logits = driver._decoder.forward(padded, driver.kv, None)
    torch.testing.assert_close(logits, oracle.logits[0, :6], atol=TOLERANCE, rtol=0)
    written = (~driver.kv.isnan()).flatten(1).any(dim=1)
    assert set(written.nonzero().flatten().tolist()) == set(driver._tables[0, :2].tolist())


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_packaged_models_load(name):
    path = resolve_path(name)
    ids = torch.randint(0, read_config(path).vocab_size, (2, 24), generator=torch.Generator().manual_seed(1)).tolist()
    model = tiny.load_hf(path)
    expected = torch.stack([tiny.hf_logits(model, row) for row in ids])
    torch.testing.assert_close(drive.logits_of(ALONE, name, ids, "chunked"), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_bfloat16_is_close(family, oracle_of):
    """bf16 weights and activations: the error is that of the format, as transformers has it, or less.

    Where two experts are almost equally good the format chooses, so single rows may be far off.
    """
    oracle = oracle_of(family)
    decoder = drive.load_stage(str(oracle.path), ALONE, dtype=torch.bfloat16)
    driver = drive.Driver(decoder, ALONE, oracle.sequences, dtype=torch.bfloat16)
    got = drive.whole(driver, len(oracle.sequences[0]))
    assert got.dtype == torch.float32
    model = tiny.load_hf(oracle.path).to(torch.bfloat16)
    theirs = torch.stack([tiny.hf_logits(model, row) for row in oracle.sequences])
    assert (got - oracle.logits).abs().mean() < 1.2 * (theirs - oracle.logits).abs().mean()
    assert (got.argmax(-1) == oracle.logits.argmax(-1)).float().mean() > 0.85
