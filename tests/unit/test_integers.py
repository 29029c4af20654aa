"""Integer weights of compressed-tensors, Kimi and AWQ: read, sliced, loaded, converted."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsv3.checkpoint.check import check_tensors
from dsv3.checkpoint.contradictions import source_warnings
from dsv3.checkpoint.convert import convert
from dsv3.checkpoint.fp8_values import from_bf16
from dsv3.checkpoint.integer_values import pack, quantize_rows, read_integers, unpack
from dsv3.checkpoint.integers import integer_form
from dsv3.checkpoint.jobs import Cast, uniform_kinds
from dsv3.checkpoint.load import load_weights
from dsv3.checkpoint.plan import make_plan
from dsv3.checkpoint.sharding import shard_region, tensor_specs
from dsv3.checkpoint.source import open_source
from dsv3.checkpoint.verify import verify_against
from dsv3.config import ModelConfig, ParallelConfig
from dsv3.config_integers import IntegerConfig, IntegerKind
from dsv3.distributed.collectives import SingleRank
from dsv3.distributed.mesh import Mesh
from dsv3.errors import CheckpointError, ConfigError
from dsv3.model.transformer import Transformer
from dsv3.parallel.weight_format import WeightFormat
from tests.checkpoint_files import Tensors, random_tensors, write_hf
from tests.integer_files import FORMS, MODEL, integer_checkpoint, quantization

CPU = torch.device("cpu")
DOWN = "model.layers.1.mlp.experts.3.down_proj"


@pytest.mark.parametrize("form", FORMS)
def test_values_of_any_region(form: str, tmp_path: Path) -> None:
    """Regions may begin inside a group and inside an int32."""
    path, _, values = integer_checkpoint(tmp_path, form)
    specs = tensor_specs(MODEL)
    with open_source(path) as source:
        assert not check_tensors(source) and not list(source_warnings(source))
        for name, want in values.items():
            if ".experts." in name and ".experts.3." not in name:
                continue
            stored = integer_form(source.tensors, name, specs[name].shape)
            assert stored is not None
            rows, cols = want.shape
            for region in (
                ((0, rows), (0, cols)),
                ((3, rows - 5), (37, cols - 1)),
                ((2, 3), (9, 10)),
            ):
                got = read_integers(source, name, specs[name].shape, stored, region).values()
                (a, b), (c, d) = region
                assert np.array_equal(got, want[a:b, c:d]), (name, region)


@pytest.mark.parametrize("form", FORMS)
def test_every_rank_loads_its_slices(form: str, tmp_path: Path) -> None:
    path, _, values = integer_checkpoint(tmp_path, form)
    with open_source(path) as source:
        specs = tensor_specs(source.config)
        for size, rank, dp in ((1, 0, 1), (2, 1, 1), (4, 2, 2), (8, 5, 1)):
            layout = ParallelConfig(world_size=size, rank=rank, dp=dp)
            mesh = Mesh(layout, CPU, SingleRank(), SingleRank(), SingleRank(), 1)
            model = Transformer(source.config, mesh, WeightFormat(torch.float32, CPU))
            load_weights(source, model.targets(), layout)
            checked = 0
            for target in model.targets():
                region = shard_region(specs[target.name], layout)
                if target.name not in values or region is None:
                    continue
                want = values[target.name][tuple(slice(*bounds) for bounds in region)]
                assert np.array_equal(target.dest.numpy(), want), target.name
                checked += 1
            assert checked >= 3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", [(2, 1), (2, 2), (8, 1)])
def test_round_trip_over_rank_files(form: str, layout: tuple[int, int], tmp_path: Path) -> None:
    """Every stored byte comes back, and the config with it; rank files read like the original."""
    path, tensors, values = integer_checkpoint(tmp_path / "hf", form)
    tp, dp = layout
    with open_source(path) as source:
        plan = make_plan(source, ParallelConfig(world_size=tp * dp, tp=tp, dp=dp))
        convert(source, plan, tmp_path / "ranks", workers=2)
        stated = source.config
        with open_source(tmp_path / "ranks") as ranks:
            verify_against(source, plan, ranks, workers=2)
    with open_source(tmp_path / "ranks") as source:
        assert source.config == stated
        stored = integer_form(source.tensors, f"{DOWN}.weight", (320, 192))
        assert stored is not None
        region = ((1, 320), (40, 100))
        got = read_integers(source, f"{DOWN}.weight", (320, 192), stored, region).values()
        assert np.array_equal(got, values[f"{DOWN}.weight"][1:320, 40:100])
        convert(source, make_plan(source, None), tmp_path / "back", workers=2)
    with open_source(tmp_path / "back") as source:
        assert source.config == stated and not list(source_warnings(source))
        assert {name: bytes(source.read(name)) for name in source.tensors} == {
            name: tensor[2] for name, tensor in tensors.items()
        }
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["quantization_config"] == quantization(form)


@pytest.mark.parametrize("form", FORMS)
def test_cast_to_bf16_and_fp8(form: str, tmp_path: Path) -> None:
    path, _, values = integer_checkpoint(tmp_path / "hf", form)
    with open_source(path) as source:
        for cast in (Cast.BF16, Cast.FP8):
            plan = make_plan(source, None, cast)
            convert(source, plan, tmp_path / cast.value, workers=1)
            with open_source(tmp_path / cast.value) as written:
                assert not check_tensors(written) and not list(source_warnings(written))
                assert written.config.integers is None
                verify_against(source, plan, written, workers=1)
    with open_source(tmp_path / "bf16") as source:
        for name, want in values.items():
            stored = from_bf16(np.frombuffer(source.read(name), np.uint16)).reshape(want.shape)
            assert np.abs(stored - want).max() <= np.abs(want).max() / 256, name


@pytest.mark.parametrize(("bits", "group", "most"), [(8, 0, 0.008), (4, 32, 0.11), (4, 128, 0.13)])
def test_written_integers_are_near(bits: int, group: int, most: float, tmp_path: Path) -> None:
    """From BF16 and from FP8; resumable and the same bytes for any number of workers."""
    config = dataclasses.replace(MODEL, hidden_size=384, moe_intermediate_size=128)
    tensors = normal_tensors(config)
    path = write_hf(tmp_path / "hf", config, tensors)
    with open_source(path) as source:
        kinds = uniform_kinds(source, bits, group)
        plan = make_plan(source, None, Cast.INTEGERS, integers=kinds)
        convert(source, plan, tmp_path / "q", workers=1)
        assert not [name for name in kinds if "kv_b" in name or "gate.weight" in name]
        layout = ParallelConfig(world_size=4)
        convert(source, make_plan(source, layout, Cast.INTEGERS, integers=kinds), tmp_path / "r", 2)
    with open_source(tmp_path / "q") as source, open_source(tmp_path / "r") as ranks:
        assert source.config.integers == IntegerConfig(
            method="compressed-tensors", kinds=(IntegerKind(bits, group),)
        )
        assert not check_tensors(source) and not list(source_warnings(source))
        assert source.config == ranks.config
        for name in kinds:
            shape = tensor_specs(config)[name].shape
            stored = integer_form(source.tensors, name, shape)
            assert stored is not None and stored.kind == (bits, group or shape[1])
            region = ((0, shape[0]), (0, shape[1]))
            got = read_integers(source, name, shape, stored, region).values()
            want = from_bf16(np.frombuffer(tensors[name][2], np.uint16)).reshape(shape)
            assert np.linalg.norm(got - want) <= most * np.linalg.norm(want), name
        for name in source.tensors:
            assert source.read(name) == ranks.read(name), name


def normal_tensors(config: ModelConfig) -> Tensors:
    """Random tensors with normal values in all matrices."""
    rng = np.random.default_rng(3)
    tensors = random_tensors(config)
    for name, (dtype, shape, _) in tensors.items():
        if dtype == "BF16":
            bits = rng.standard_normal(shape, np.float32).view(np.uint32) >> 16
            tensors[name] = dtype, shape, bits.astype(np.uint16).tobytes()
    return tensors


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_and_rounding(bits: int) -> None:
    rng = np.random.default_rng(0)
    low = -(1 << bits - 1)
    q = rng.integers(low, -low, (5, 64)).astype(np.int8)
    assert np.array_equal(unpack(pack(q, bits), bits), q)
    x = rng.standard_normal((6, 64)).astype(np.float32)
    x[2] = 0
    got, scale = quantize_rows(x, bits, 32)
    values = got * from_bf16(scale).repeat(32, 1)
    assert not values[2].any()
    # No worse than rounding with the scale of the largest value.
    plain = np.abs(x.reshape(6, 2, 32)).max(2) / (-low - 1)
    plain = np.where(plain > 0, plain, 1).repeat(32, 1)
    assert np.square(values - x).sum() <= np.square(np.rint(x / plain) * plain - x).sum() * 1.1


FAULTS = [
    (
        {f"{DOWN}.weight_scale": None},
        "weight_packed is stored, but .*down_proj.weight_scale is mis",
    ),
    (
        {f"{DOWN}.weight_shape": None},
        "weight_packed is stored, but .*down_proj.weight_shape is mis",
    ),
    ({f"{DOWN}.weight_scale": ("BF16", (320, 5), bytes(3200))}, r"\[320, 5\]; for a weight of"),
    ({f"{DOWN}.weight_scale": ("BF16", (320,), bytes(640))}, r"\[320\]; for a weight of"),
    ({f"{DOWN}.weight_scale": ("I8", (320, 6), bytes(1920))}, "is I8; it is read as BF16 or F16"),
    ({f"{DOWN}.weight_packed": ("I32", (320, 23), bytes(29440))}, r"\[320, 23\]; for a weight of"),
    ({f"{DOWN}.weight_packed": ("F32", (320, 24), bytes(30720))}, "is F32; it is read as I32"),
    ({f"{DOWN}.weight_scale_inv": ("F32", (3, 2), bytes(24))}, "in addition to .*weight_packed"),
    ({f"{DOWN}.weight_zero_point": ("I32", (40, 6), bytes(960))}, "asymmetric integer weights"),
    (
        {"model.layers.1.mlp.gate.weight_packed": ("I32", (8, 40), bytes(1280))},
        "is not part of this model: .*gate.weight is stored, too, as BF16",
    ),
    ({f"{DOWN}.weight_scale": ("BF16", (320, 3), bytes(1920))}, "has int4 with group_size=64, but"),
    (
        {f"{DOWN}.weight_packed": None},
        r"down_proj\.weight_s[a-z]+ is not part of this model: the weight that it belongs to",
    ),
    ({f"{DOWN}.weight_scale": ("BF16", (320, 6, 1), bytes(3840))}, r"\[320, 6, 1\]; for a weight"),
    ({f"{DOWN}.weight_scale": ("BF16", (320, 0), b"")}, r"\[320, 0\]; for a weight of"),
    ({f"{DOWN}.weight_scale": ("BF16", (), bytes(2))}, r"weight_scale is \[\]; for a weight of"),
    (
        {f"{DOWN}.weight": ("BF16", (320, 192), bytes(122880))},
        "is not part of this model: .*down_proj.weight is stored, too, as BF16",
    ),
]
AWQ_FAULTS = [
    ({f"{DOWN}.qzeros": None}, "qweight is stored, but .*down_proj.qzeros is missing"),
    ({f"{DOWN}.scales": None}, "qweight is stored, but .*down_proj.scales is missing"),
    ({f"{DOWN}.qweight": None}, "the weight that it belongs to, .*down_proj.weight, is absent"),
    (
        {f"{DOWN}.qweight": ("I32", (320, 24), bytes(30720))},
        r"qweight is \[320, 24\]; for a weight",
    ),
]


@pytest.mark.parametrize(
    ("form", "change", "words"),
    [*(("int4-32", *fault) for fault in FAULTS), *(("awq", *fault) for fault in AWQ_FAULTS)],
)
def test_faults_of_tensors(form: str, change: dict[str, Any], words: str, tmp_path: Path) -> None:
    path, tensors, _ = integer_checkpoint(tmp_path / "hf", form)
    changed = {name: t for name, t in {**tensors, **change}.items() if t is not None}
    config = (path / "config.json").read_text()
    write_hf(path, MODEL, changed)
    (path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=words) as caught, open_source(path) as source:
        check_tensors(source)
    assert "\n" not in str(caught.value)


def group(**change: object) -> dict[str, Any]:
    """Return a quantization_config of int4 whose group's weights are changed."""
    config = quantization("int4-32")
    config["config_groups"]["group_0"]["weights"] |= change
    return config


CONFIGS = [
    (group(group_size=0), "group_size=0 must be a positive multiple of 8"),
    (group(group_size=None), "group_size=None must be"),
    (group(group_size="32"), "group_size='32' must be"),
    (group(group_size=12), "group_size=12 must be"),
    (group(symmetric=False), "weights.symmetric=False is not supported"),
    (group(dynamic=True), "weights.dynamic=True is not supported"),
    (group(strategy="tensor"), "weights.strategy='tensor' with"),
    (group(strategy=["group"]), r"weights.strategy=\['group'\] with"),
    (group(strategy="channel"), "weights.strategy='channel' with group_size=32"),
    (group(actorder="group"), "weights.actorder='group' is not supported"),
    (group(num_bits=3), "weights.num_bits=3 is not supported"),
    (group(num_bits="4"), "weights.num_bits='4' is not supported"),
    (group(type="float"), "weights.num_bits=4 is not supported"),
    (quantization("int4-32") | {"format": "marlin-24"}, "format='marlin-24' must be one of"),
    (quantization("int4-32") | {"ignore": "lm_head"}, "ignore='lm_head' must be a list"),
    (quantization("int4-32") | {"kv_cache_scheme": {}}, "kv_cache_scheme is not supported"),
    (quantization("int4-32") | {"config_groups": {"g": {"weights": 4}}}, "g has no weights"),
    (quantization("int4-32") | {"quantization_status": "calibration"}, "must be 'compressed'"),
    (quantization("awq") | {"bits": 8}, "bits=8 is not supported; it must be 4"),
    (quantization("awq") | {"bits": None}, "bits is missing"),
    (quantization("awq") | {"group_size": "128"}, "group_size='128' must be"),
    (quantization("awq") | {"version": "gemv"}, "version='gemv' is not supported"),
    (quantization("awq") | {"zero_point": False}, "zero_point=False is not supported"),
    (
        quantization("awq") | {"modules_to_not_convert": 3},
        "modules_to_not_convert=3 must be a list",
    ),
]


@pytest.mark.parametrize(("config", "words"), CONFIGS)
def test_malformed_configs(config: dict[str, Any], words: str, tmp_path: Path) -> None:
    path, _, _ = integer_checkpoint(tmp_path, "awq" if "bits" in config else "int4-32")
    data = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(data | {"quantization_config": config}))
    kinds = (ConfigError, CheckpointError)
    if "num_bits" in words:  # a format that is not read: the stored tensors decide
        with open_source(path) as source:
            assert re.search(words, source.config.warning)
        return
    with pytest.raises(kinds, match=words) as caught:
        open_source(path)
    assert "\n" not in str(caught.value)


def test_a_stale_or_missing_config_is_a_warning(tmp_path: Path) -> None:
    path, _, _ = integer_checkpoint(tmp_path / "q", "int4-32")
    data = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**data, "quantization_config": None}))
    with open_source(path) as source:
        assert "integer weights are stored" in next(iter(source_warnings(source)))
        assert source.config.integers is not None
        convert(source, make_plan(source, None), tmp_path / "named", workers=1)
    with open_source(tmp_path / "named") as source:
        assert not list(source_warnings(source)) and source.config.integers is not None
    plain = write_hf(tmp_path / "plain", MODEL, random_tensors(MODEL))
    (plain / "config.json").write_text(json.dumps(data))
    with open_source(plain) as source:
        assert "no weight is stored as integers" in next(iter(source_warnings(source)))
        convert(source, make_plan(source, None), tmp_path / "out", workers=1)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
