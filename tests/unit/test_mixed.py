"""Mixed precision: kinds by measured loss under a budget, and the config that describes them."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from dsv3.checkpoint.check import check_tensors
from dsv3.checkpoint.convert import convert
from dsv3.checkpoint.jobs import Cast
from dsv3.checkpoint.mixed import KINDS, bits_of, mixed_kinds, site_of, sites
from dsv3.checkpoint.plan import make_plan
from dsv3.checkpoint.source import open_source
from dsv3.config_integers import IntegerKind
from dsv3.errors import ConfigError
from tests.checkpoint_files import TINY, random_tensors, write_hf

MODEL = dataclasses.replace(TINY, hidden_size=256, moe_intermediate_size=128, q_lora_rank=128)


def measured(change: dict[str, dict[str, Any]] | None = None) -> dict[str, Any]:
    """Return losses that fall with the size of the kind."""
    losses: dict[str, Any] = {
        site: {"int4-128": 1e-3, "int4-32": 5e-4, "int8": 1e-5} for site in sites(MODEL)
    }
    return {"sensitivity": losses | (change or {})}


def write(path: Path, data: dict[str, Any]) -> Path:
    path.write_text(json.dumps(data))
    return path


def test_sites() -> None:
    assert site_of("model.layers.3.mlp.experts.17.up_proj.weight") == "3 mlp.experts.gate_up_proj"
    assert site_of("model.layers.0.self_attn.q_a_proj.weight") == "0 self_attn.in_proj"
    assert site_of("model.layers.0.self_attn.kv_a_proj_with_mqa.weight") == "0 self_attn.in_proj"
    assert not any("kv_b" in site for site in sites(MODEL))


def test_the_budget_goes_where_it_saves_most(tmp_path: Path) -> None:
    path = write_hf(tmp_path / "hf", MODEL, random_tensors(MODEL))
    fragile = "1 self_attn.o_proj"
    losses = measured({fragile: {"int4-128": 9.0, "int4-32": 4.0, "int8": 1.0}})
    file = write(tmp_path / "s.json", losses)
    weights = sites(MODEL)
    with open_source(path) as source:
        for bits in (4.5, 6.0, 8.2):
            kinds = mixed_kinds(source, bits, file)
            specs = [spec for some in weights.values() for spec in some]
            used = sum(bits_of(spec, kinds.get(spec.name)) for spec in specs)
            assert used <= bits * sum(s.shape[0] * s.shape[1] for s in specs)
            assert all(kinds.get(s.name) in (None, KINDS["int8"]) for s in weights[fragile])
        everything = mixed_kinds(source, 16, file)
        assert not everything  # all in BF16
        with pytest.raises(ConfigError, match=r"the smallest integers take 4\.[0-9]+ bits"):
            mixed_kinds(source, 4, file)


def test_a_mixed_checkpoint_describes_itself(tmp_path: Path) -> None:
    path = write_hf(tmp_path / "hf", MODEL, random_tensors(MODEL))
    file = write(tmp_path / "s.json", measured())
    with open_source(path) as source:
        kinds = mixed_kinds(source, 5, file)
        convert(source, make_plan(source, None, Cast.INTEGERS, integers=kinds), tmp_path / "q", 1)
    with open_source(tmp_path / "q") as source:
        assert not check_tensors(source)
        assert source.config.integers is not None
        assert set(source.config.integers.kinds) == set(kinds.values())
    config = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    modules = [name.removesuffix(".weight") for name in kinds]

    def matches(module: str, targets: list[str]) -> bool:
        plain = [t for t in targets if not t.startswith("re:")]
        patterns = [t.removeprefix("re:") for t in targets if t.startswith("re:")]
        return module in plain or any(re.match(pattern, module) for pattern in patterns)

    for module in modules:
        assert not matches(module, config["ignore"])
        found = [g for g in config["config_groups"].values() if matches(module, g["targets"])]
        assert len(found) == 1, module
        given = found[0]["weights"]
        kind = IntegerKind(given["num_bits"], given["group_size"] or 0)
        assert kind == kinds[f"{module}.weight"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({}, "sensitivity"),
        ({"sensitivity": 3}, "sensitivity=3 must be a mapping"),
        (
            measured({"0 self_attn.o_proj": {"int8": 1}}),
            "0 self_attn.o_proj: int4-128=None must be",
        ),
        (measured({"0 self_attn.o_proj": {"int4-128": -1.0}}), "int4-128=-1.0 must be a number"),
        (measured({"0 self_attn.o_proj": {"int4-128": True}}), "int4-128=True must be a number"),
    ],
)
def test_malformed_files(data: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = write_hf(tmp_path / "hf", MODEL, random_tensors(MODEL))
    file = write(tmp_path / "s.json", data)
    with open_source(path) as source, pytest.raises(ConfigError, match=words) as caught:
        mixed_kinds(source, 5, file)
    assert "\n" not in str(caught.value)


def test_a_file_of_another_model(tmp_path: Path) -> None:
    path = write_hf(tmp_path / "hf", MODEL, random_tensors(MODEL))
    data = measured()
    del data["sensitivity"]["1 self_attn.o_proj"]
    with (
        open_source(path) as source,
        pytest.raises(ConfigError, match=r"no loss of 1 self_attn\.o_proj"),
    ):
        mixed_kinds(source, 5, write(tmp_path / "s.json", data))
