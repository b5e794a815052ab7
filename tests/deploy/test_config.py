"""Typed fields of the cluster file: every value kind, every YAML 1.1 trap, all errors at once. About 2 s."""

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.deploy.config import ClusterConfig, load_config, parse_config
from phalanx.deploy.fields import keys
from phalanx.errors import ConfigError


def parse(text: str) -> ClusterConfig:
    return parse_config(f"model: {{path: tiny}}\n{text}", "f.yaml")


def refusal(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    return str(caught.value)


def value_of(config: object, key: str) -> object:
    for part in key.split("."):
        config = getattr(config, part)
    return config


ACCEPTED: list[tuple[str, str, object]] = [
    ("replicas", "3", 3),
    ("replicas", "'3'", 3),
    ("kv.gpu_fraction", "0.5", 0.5),
    ("kv.gpu_fraction", "5e-1", 0.5),
    ("kv.gpu_fraction", "1", 1.0),
    ("kv.prefix_cache", "false", False),
    ("kv.prefix_cache", "true", True),
    ("kv.num_blocks", "auto", "auto"),
    ("kv.num_blocks", "200", 200),
    ("kv.block_size", "64", 64),
    ("kv.cpu_memory", "0", 0),
    ("kv.cpu_memory", "0GiB", 0),
    ("server.max_message", "1.5MiB", 1572864),
    ("server.max_message", "512B", 512),
    ("server.drain", "250ms", 0.25),
    ("server.drain", "2min", 120.0),
    ("server.drain", "1h", 3600.0),
    ("server.detach_grace", "0", 0.0),
    ("server.metrics", "off", "off"),
    ("server.listen", "'[::1]:50051'", "[::1]:50051"),
    ("server.listen", "0.0.0.0:0", "0.0.0.0:0"),
    ("ray.address", "ray://head.example:10001", "ray://head.example:10001"),
    ("ray.address", "10.0.0.1:6379", "10.0.0.1:6379"),
    ("ray.address", "auto", "auto"),
    ("ray.placement_timeout", "10min", 600.0),
    ("kernels", "{paged_attention: reference}", {"paged_attention": "reference"}),
    # A string stays the text that is written, whatever YAML 1.1 would make of it.
    ("model.name", "no", "no"),
    ("model.name", "017", "017"),
    ("model.name", "12:30:45", "12:30:45"),
    ("model.name", "1_000", "1_000"),
    ("model.name", ".nan", ".nan"),
    ("model.name", "0x10", "0x10"),
    ("model.name", "2024-01-01", "2024-01-01"),
    ("model.name", "'null'", "null"),
    ("model.name", "1e3", "1e3"),
]


@pytest.mark.parametrize(("key", "text", "value"), ACCEPTED, ids=[f"{key}={text}" for key, text, _ in ACCEPTED])
def test_accepted(key: str, text: str, value: object) -> None:
    section, _, name = key.rpartition(".")
    if section == "model":
        config = parse_config(f"model: {{path: tiny, {name}: {text}}}", "f.yaml")
    else:
        config = parse(f"{section}: {{{name}: {text}}}" if section else f"{name}: {text}")
    read = value_of(config, key)
    assert read == value
    assert type(read) is type(value)


REFUSED = [
    ("replicas: 017", "2:11: replicas: '017' is not an integer from 1 to 1024 .*octal"),
    ("replicas: 0x10", "'0x10' is not an integer .*write it in decimal"),
    ("replicas: 1_000", "'1_000' is not .*underscores"),
    ("replicas: 12:30:45", "base 60"),
    ("replicas: 1e3", "'1e3' is not an integer from 1 to 1024"),
    ("replicas: 2.0", "'2.0' is not an integer"),
    ("replicas: +2", "is not an integer"),
    ("replicas: .inf", "only finite"),
    ("replicas: 0", "'0' is not an integer from 1 to 1024"),
    ("replicas: -1", "'-1' is not an integer from 1 to 1024"),
    ("replicas: 99999999999999999999999", "is not an integer from 1 to 1024"),
    ("replicas: ", "the value is empty; write an integer"),
    ("replicas: null", "the value is null; write an integer"),
    ("replicas: ~", "the value is ~; write an integer"),
    ("replicas: ''", "the value is empty"),
    ("replicas: yes", "boolean"),
    ("replicas: [1]", "2:11: replicas: a sequence stands where an integer from 1 to 1024 is expected"),
    ("replicas: {a: 1}", "a mapping stands where"),
    ("device: gpu", "'gpu' is not auto, cuda or cpu"),
    ("kv: {prefix_cache: yes}", "2:20: kv.prefix_cache: 'yes' is not true or false .a YAML 1.1 boolean"),
    ("kv: {prefix_cache: on}", "'on' is not true or false"),
    ("kv: {prefix_cache: True}", "'True' is not true or false"),
    ("kv: {prefix_cache: 1}", "'1' is not true or false"),
    ("kv: {gpu_fraction: .nan}", "'.nan' is not a number above 0 and up to 1 .only finite"),
    ("kv: {gpu_fraction: 90%}", "'90%' is not a number"),
    ("kv: {gpu_fraction: 0}", "above 0 and up to 1"),
    ("kv: {gpu_fraction: 1.01}", "above 0 and up to 1"),
    ("kv: {gpu_fraction: 1e999}", "above 0 and up to 1"),
    ("kv: {gpu_fraction: 0_9}", "underscores"),
    ("kv: {gpu_fraction: 00.9}", "'00.9' is not a number"),
    ("kv: {block_size: 17}", "'17' is not 8, 16, 32, 64, 128 or 256, or auto"),
    ("kv: {num_blocks: 1}", "an integer from 2 to 2147483647, or auto"),
    ("kv: {cpu_memory: 64}", "'64' is not a size with a unit .B, KiB, MiB, GiB, TiB. such as 64MiB"),
    ("kv: {cpu_memory: 64GB}", "'64GB' is not a size with a unit"),
    ("kv: {cpu_memory: 64 GiB}", "'64 GiB' is not a size"),
    ("kv: {cpu_memory: 0.3B}", "'0.3B' is not a size"),
    ("kv: {cpu_memory: 1GiB}", "2:18: kv.cpu_memory: offload to CPU memory is not implemented in this version; use 0"),
    ("server: {drain: 60}", "'60' is not a duration with a unit .ms, s, min, h. such as 30s"),
    ("server: {drain: 1:00}", "base 60"),
    ("server: {drain: -1s}", "is not a duration"),
    ("server: {listen: localhost}", "'localhost' is not an address host:port"),
    ("server: {listen: 'a:70000'}", "port from 0 to 65535"),
    ("server: {listen: ':1'}", "is not an address"),
    ("server: {metrics: no}", "is not an address host:port .* or off"),
    ("server: {listen: 'a:9400'}", "2:18: server.metrics: port 9400 is also that of server.listen"),
    ("ray: {address: 'ray://head'}", "local, auto, ray://host:port or host:port"),
    ("ray: {address: auto, nodes: 2}", "2:29: ray.nodes: 2 nodes can only be started with address local, not 'auto'"),
    ("parallel: {pipeline: 3, stage_layers: [1, 2]}", "stage_layers: 2 entries for 3 stages; give one per stage"),
    ("parallel: {stage_layers: [1, 0x2]}", "'0x2' is not an integer"),
    ("parallel: {stage_layers: [[1]]}", "a sequence stands where"),
    ("parallel: {stage_layers: 2}", "'2' is not a list such as .9, 9."),
    ("parallel: {stage_layers: {}}", "a mapping stands where a list"),
    ("kernels: [a]", "a mapping is expected"),
    ("kernels: {Paged: reference}", "'Paged' is not a name of lower-case"),
    ("kernels: {a: 'x y'}", "'x y' is not a name"),
    ("paralel: {tensor: 2}", "2:1: unknown key 'paralel'; the nearest is 'parallel'; valid keys: model, ray, device"),
    (
        "parallel: {tensr: 2}",
        "2:12: unknown key 'parallel.tensr'; the nearest is 'parallel.tensor'; valid keys: tensor",
    ),
    ("parallel:", "2:10: parallel: keys are expected below; valid keys: tensor, pipeline, data, stage_layers"),
    ("parallel: 2", "parallel: keys are expected below"),
    ("parallel: [2]", "parallel: keys are expected below"),
]


@pytest.mark.parametrize(("text", "pattern"), REFUSED, ids=[text for text, _ in REFUSED])
def test_refused_in_one_line(text: str, pattern: str) -> None:
    message = refusal(text)
    assert re.search(pattern, message), message
    assert len(message.splitlines()) == 1
    assert message.startswith("f.yaml:2:")


def test_all_errors_at_once_with_their_places() -> None:
    text = "parallel: {tensor: 017, tensr: 1}\nray: {address: auto, nodes: 2}\n"
    text += "kv: &x {num_blocks: no}\nreplicas: *x\ndevice: 1"
    lines = refusal(text).splitlines()
    assert [re.match(r"f\.yaml:\d+:\d+: ['\w.]*", line)[0] for line in lines] == [  # type: ignore[index]
        "f.yaml:2:20: parallel.tensor",
        "f.yaml:2:25: unknown",
        "f.yaml:3:29: ray.nodes",
        "f.yaml:4:5: the",
        "f.yaml:4:21: kv.num_blocks",
        "f.yaml:5:11: the",
        "f.yaml:6:9: device",
    ]


def test_a_wrong_key_is_not_blamed_twice() -> None:
    """Conflicts that read a refused key would be about its default, which the user never wrote."""
    assert len(refusal("parallel: {pipeline: two, stage_layers: [1, 2]}").splitlines()) == 1
    assert len(refusal("ray: {address: x, nodes: 2}").splitlines()) == 1


@pytest.mark.parametrize("text", ["ray: {nodes: *x}", "parallel: {stage_layers: *x}", "server: {listen: *x}", "kv: *x"])
def test_a_refused_value_is_not_looked_at(text: str) -> None:
    assert re.fullmatch(r"f\.yaml:2:\d+: the alias \*x is refused; write the value out", refusal(text))


@pytest.mark.parametrize("text", ["", "# nothing\n", "replicas: 2", "model: {}", "---"])
def test_model_path_is_required(text: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.path is missing"):
        parse_config(text, "f.yaml")


@pytest.mark.parametrize("path", ["", "~", '"\\u0000"', '"a\\nb"', '"\\ud800"', "[a]"])
def test_path_is_printable_text(path: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.path"):
        parse_config(f"model: {{path: {path}}}", "f.yaml")


@pytest.mark.parametrize("value", ["0", "999ms", "11min"])
def test_placement_timeout_has_bounds(value: str) -> None:
    with pytest.raises(ConfigError, match=r"ray.placement_timeout: .*s is not within 1s and 600s"):
        parse(f"ray: {{placement_timeout: {value}}}")


def test_defaults_are_those_of_the_design_page() -> None:
    config = parse("")
    defaults = {key: value_of(config, key) for key in keys(ClusterConfig)}
    assert defaults["ray.address"] == "local"
    assert defaults["scheduler.max_sequences"] == 256
    assert defaults["scheduler.max_queue"] == 1024
    assert defaults["kv.gpu_fraction"] == 0.9
    assert (defaults["server.drain"], defaults["server.detach_grace"]) == (60.0, 10.0)
    assert defaults["server.max_message"] == 16 * 2**20
    assert isinstance(defaults["kernels"], Mapping)
    auto = [key for key, value in defaults.items() if value == "auto"]
    assert len(auto) == 10


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    with pytest.raises(ConfigError, match=r"cluster\.yaml: cannot be read: No such file"):
        load_config(file)
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path)
    file.write_bytes(b"\xef\xbb\xbfmodel: {path: t\xc3\xafny}\r\nreplicas: 2\r\n")
    assert load_config(file).model.path == "tïny"
    file.write_bytes(b"model: {path: \xff}")
    with pytest.raises(ConfigError, match="byte 14 is not UTF-8"):
        load_config(file)
    file.write_bytes(b"model: {path: tiny}\n" + b"#" * 2**20)
    with pytest.raises(ConfigError, match="at most 1048576"):
        load_config(file)
    file.write_bytes(b"#" * 2**20 + "é".encode())
    with pytest.raises(ConfigError, match="more than 1048576"):
        load_config(file)


BASE = "model: {path: tiny, name: x}\nparallel:\n  tensor: 2\n  stage_layers: [1]\n"
BASE += "kv: {num_blocks: auto}\nserver: {drain: 60s}\n"


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(0, len(BASE) - 1), st.integers(0, 6), st.text(" \n:{}[]'\"&*!#-aé0\\\t", max_size=6))
def test_damaged_files_raise_nothing_but_config_errors(at: int, cut: int, put: str) -> None:
    message = None
    try:
        parse_config(BASE[:at] + put + BASE[at + cut :], "f.yaml")
    except ConfigError as error:
        message = str(error)
    assert message is None or all(re.match(r"f\.yaml:\d+:\d+: ", line) for line in message.splitlines())
