"""Mixed precision: kinds by measured loss under a budget, and the config that describes them."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3.checkpoint.check import check_tensors
from dsv3.checkpoint.contradictions import source_warnings
from dsv3.checkpoint.convert import convert
from dsv3.checkpoint.jobs import Cast
from dsv3.checkpoint.load import load_weights
from dsv3.checkpoint.mixed import KINDS, bits_of, mixed_kinds, site_of, sites
from dsv3.checkpoint.plan import make_plan
from dsv3.checkpoint.reader import Source
from dsv3.checkpoint.sharding import FP8_DTYPE
from dsv3.checkpoint.source import open_source
from dsv3.checkpoint.verify import verify_against, verify_digests
from dsv3.config import ModelConfig, ParallelConfig, QuantizationConfig
from dsv3.config_integers import IntegerKind
from dsv3.distributed.collectives import SingleRank
from dsv3.distributed.mesh import Mesh
from dsv3.errors import ConfigError
from dsv3.model.transformer import Transformer
from dsv3.parallel.weights import WeightFormat
from tests.checkpoint_files import FP8, TINY, random_tensors, write_hf

MODEL = dataclasses.replace(TINY, hidden_size=256, moe_intermediate_size=128, q_lora_rank=128)
# Shards cut blocks of its experts of 192 rows, and of its kv_b_proj.
BLOCKS = dataclasses.replace(
    MODEL, moe_intermediate_size=192, num_nextn_predict_layers=1, quantization=FP8
)
FRAGILE = {"int4-128": 9.0, "int4-32": 4.0, "int8": 1.0}
CPU = torch.device("cpu")


def measured(
    change: dict[str, dict[str, Any]] | None = None, model: ModelConfig = MODEL
) -> dict[str, Any]:
    """Return losses that fall with the size of the kind."""
    losses: dict[str, Any] = {
        site: {"int4-128": 1e-3, "int4-32": 5e-4, "int8": 1e-5}
        for site, specs in sites(model).items()
        if not specs[0].mtp
    }
    return {"sensitivity": losses | (change or {})}


def bits_per_weight(source: Source, kinds: dict[str, IntegerKind]) -> float:
    specs = [spec for of_site in sites(source.config).values() for spec in of_site]
    bits = sum(bits_of(source, spec, kinds.get(spec.name)) for spec in specs)
    return bits / sum(spec.shape[0] * spec.shape[1] for spec in specs)


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
    losses = measured({fragile: FRAGILE})
    file = write(tmp_path / "s.json", losses)
    weights = sites(MODEL)
    with open_source(path) as source:
        for bits in (4.5, 6.0, 8.2):
            kinds = mixed_kinds(source, bits, file)
            assert bits - 0.5 < bits_per_weight(source, kinds) <= bits
            assert all(kinds.get(s.name) in (None, KINDS["int8"]) for s in weights[fragile])
        everything = mixed_kinds(source, 16, file)
        assert not everything  # all in BF16
        with pytest.raises(ConfigError, match=r"the smallest integers take 4\.[0-9]+ bits"):
            mixed_kinds(source, 4, file)


@pytest.mark.parametrize("by_layer", [False, True])
def test_kinds_of_routed_experts(by_layer: bool, tmp_path: Path) -> None:
    """One for all projections, whose groups fit 256 and 192 columns, and for all layers or each."""
    model = dataclasses.replace(
        MODEL, moe_intermediate_size=192, num_hidden_layers=3, num_nextn_predict_layers=1
    )
    path = write_hf(tmp_path / "hf", model, random_tensors(model))
    losses = measured({"2 mlp.experts.down_proj": FRAGILE}, model)
    small, fine, wide = IntegerKind(4, 64), IntegerKind(4, 32), IntegerKind(8, 0)
    wanted = {4.3: (small, small), 4.4: (fine, fine), 8.05: (wide, wide)}
    if by_layer:
        wanted = {4.22: (small, small), 4.34: (small, fine), 5.5: (fine, wide)}
    with open_source(path) as source:
        for bits, (first, second) in wanted.items():
            kinds = mixed_kinds(
                source,
                bits,
                write(tmp_path / "s.json", losses),
                experts_by_layer=by_layer,
            )
            for layer, want in ((1, first), (2, second), (3, small)):
                prefix = f"model.layers.{layer}.mlp.experts."
                found = {kind for name, kind in kinds.items() if name.startswith(prefix)}
                assert found == {want}, (bits, layer)
            assert bits_per_weight(source, kinds) <= bits


def test_only_stored_weights_count(tmp_path: Path) -> None:
    """An MTP layer that is absent or left out leaves no bits to the others."""
    tensors = random_tensors(BLOCKS)
    path = write_hf(tmp_path / "hf", BLOCKS, tensors)
    main = {name: t for name, t in tensors.items() if not name.startswith("model.layers.2.")}
    bare = write_hf(tmp_path / "bare", BLOCKS, main)
    file = write(tmp_path / "s.json", measured(model=BLOCKS))
    with open_source(path) as source, open_source(bare) as without:
        kinds = mixed_kinds(source, 5, file, keeps_mtp=False)
        assert kinds == mixed_kinds(without, 5, file)
        assert kinds and not any(name.startswith("model.layers.2.") for name in kinds)
        assert any(name.startswith("model.layers.2.") for name in mixed_kinds(source, 5, file))


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
def test_fp8_weights_stay_as_they_are(scale_fmt: str | None, tmp_path: Path) -> None:
    """From FP8, a weight gets int4 or stays in FP8, which loses nothing and is as small as int8."""
    model = dataclasses.replace(BLOCKS, quantization=QuantizationConfig(scale_fmt=scale_fmt))
    tensors = random_tensors(model)
    path = write_hf(tmp_path / "hf", model, tensors)
    file = write(tmp_path / "s.json", measured({"1 self_attn.o_proj": FRAGILE}, model))
    with open_source(path) as source:
        kinds = mixed_kinds(source, 5, file)
        assert {kind.bits for kind in kinds.values()} == {4}
        assert 4.5 < bits_per_weight(source, kinds) <= 5
        plan = make_plan(source, None, Cast.MIXED, integers=kinds)
        convert(source, plan, tmp_path / "q", workers=1)
        with open_source(tmp_path / "q") as written:
            verify_against(source, plan, written, workers=1)
            verify_digests(written, workers=1)
            assert not check_tensors(written) and not list(source_warnings(written))
            assert written.config == plan.config
            kept = [name for name, tensor in tensors.items() if tensor[0] == FP8_DTYPE]
            kept = [name for name in kept if name not in kinds]
            assert "model.layers.1.self_attn.o_proj.weight" in kept
            assert "model.layers.0.self_attn.kv_b_proj.weight" in kept
            for name in kept:
                scale = name.removesuffix(".weight") + ".weight_scale_inv"
                assert written.tensors[name].dtype == FP8_DTYPE
                assert bytes(written.read(name)) == tensors[name][2]
                assert bytes(written.read(scale)) == tensors[scale][2]
    index = json.loads((tmp_path / "q" / "model.safetensors.index.json").read_text())["weight_map"]
    assert not any(name.endswith("_inv") for name in index)
    config = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision" and config.get("scale_fmt") == scale_fmt
    (blocks,) = (
        group for group in config["config_groups"].values() if group["format"] == "float-quantized"
    )
    assert (blocks["weights"]["strategy"], blocks["weights"]["block_structure"]) == (
        "block",
        [128, 128],
    )
    assert matches("model.layers.1.self_attn.o_proj", blocks["targets"])


def test_integers_beside_fp8_travel_between_layouts(tmp_path: Path) -> None:
    """Rank files have our names of scales; the same bytes come back from any of them."""
    path = write_hf(tmp_path / "hf", BLOCKS, random_tensors(BLOCKS))
    file = write(tmp_path / "s.json", measured(model=BLOCKS))
    with open_source(path) as source:
        kinds = mixed_kinds(source, 5.2, file)
        layouts = (None, ParallelConfig(world_size=4), ParallelConfig(world_size=4, tp=2, dp=2))
        for number, layout in enumerate(layouts):
            plan = make_plan(source, layout, Cast.MIXED, integers=kinds)
            convert(source, plan, tmp_path / f"{number}", workers=2)
    for start, end in ((0, 1), (1, 2), (2, 0)):
        target = tmp_path / f"{start}-{end}"
        with open_source(tmp_path / f"{start}") as source:
            convert(source, make_plan(source, layouts[end]), target, workers=2)
        files = {f.name: f.read_bytes() for f in (tmp_path / f"{end}").iterdir()}
        assert {f.name: f.read_bytes() for f in target.iterdir()} == files
    with open_source(tmp_path / "0") as source:
        convert(source, make_plan(source, None, Cast.BF16), tmp_path / "bf16", workers=1)
    want = weights_of(tmp_path / "bf16", ParallelConfig())
    for world_size, rank in ((1, 0), (2, 1), (8, 5)):
        layout = ParallelConfig(world_size=world_size, rank=rank)
        parts = [weights_of(tmp_path / name, layout) for name in ("0", "1", "2")]
        for name, part in parts[0].items():
            assert all(torch.equal(part, other[name]) for other in parts[1:]), name
            if world_size == 1:
                assert (part - want[name]).abs().max() <= part.abs().max() / 256, name


def weights_of(path: Path, layout: ParallelConfig) -> dict[str, torch.Tensor]:
    """Return a rank's weights, dequantized to float32."""
    with open_source(path) as source:
        mesh = Mesh(layout, CPU, SingleRank(), SingleRank(), SingleRank(), 1)
        model = Transformer(source.config, mesh, WeightFormat(torch.float32, CPU))
        load_weights(source, model.targets(), layout)
        return {target.name: target.dest.clone() for target in model.targets()}


def matches(module: str, targets: list[str]) -> bool:
    """Return True if a module is among the targets of a group."""
    plain = [t for t in targets if not t.startswith("re:")]
    patterns = [t.removeprefix("re:") for t in targets if t.startswith("re:")]
    return module in plain or any(re.match(pattern, module) for pattern in patterns)


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
        (measured({"0 self_attn.o_proj": {"int4-128": 10**400}}), "int4-128=1.* must be a number"),
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
