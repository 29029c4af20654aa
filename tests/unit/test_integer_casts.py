"""Integer checkpoints cast to other integers, and the configs that are written with them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsv3.checkpoint.check import check_tensors
from dsv3.checkpoint.contradictions import source_warnings
from dsv3.checkpoint.convert import convert
from dsv3.checkpoint.fp8_values import from_bf16
from dsv3.checkpoint.integer_values import read_integers
from dsv3.checkpoint.integers import Layout, integer_form
from dsv3.checkpoint.jobs import Cast, uniform_kinds
from dsv3.checkpoint.load import load_weights
from dsv3.checkpoint.plan import make_plan
from dsv3.checkpoint.reader import Source
from dsv3.checkpoint.region import whole
from dsv3.checkpoint.sharding import tensor_specs
from dsv3.checkpoint.source import open_source
from dsv3.checkpoint.verify import verify_against
from dsv3.config import ParallelConfig
from dsv3.config_files import load_model_config
from dsv3.distributed.collectives import SingleRank
from dsv3.distributed.mesh import Mesh
from dsv3.errors import CheckpointError
from dsv3.model.transformer import Transformer
from dsv3.parallel.weight_format import WeightFormat
from tests.checkpoint_files import Tensors, write_hf
from tests.integer_files import MODEL, integer_checkpoint, quantization

DOWN = "model.layers.1.mlp.experts.3.down_proj"


def with_config(path: Path, tensors: Tensors, form: str, **more: object) -> Path:
    """Write a checkpoint of other tensors with the quantization_config of a form."""
    config = json.loads((path / "config.json").read_text())
    write_hf(path, MODEL, tensors)
    config["quantization_config"] = quantization(form) | more
    (path / "config.json").write_text(json.dumps(config))
    return path


def layouts(source: Source) -> set[Layout]:
    specs = tensor_specs(source.config).values()
    forms = (integer_form(source.tensors, spec.name, spec.shape) for spec in specs)
    return {form.layout for form in forms if form is not None}


def values_of(source: Source, name: str) -> Any:
    """Return the values of a weight stored as integers or in BF16."""
    shape = tensor_specs(source.config)[name].shape
    form = integer_form(source.tensors, name, shape)
    if form is None:
        return from_bf16(np.frombuffer(source.read(name), np.uint16)).reshape(shape)
    return read_integers(source, name, shape, form, whole(shape)).values()


@pytest.mark.parametrize("form", ["int8", "packed8", "int4-64", "kimi", "awq"])
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_that_get_no_integers_become_bf16(form: str, bits: int, tmp_path: Path) -> None:
    """One format is written: nothing of the source's own remains."""
    path, _, values = integer_checkpoint(tmp_path / "hf", form)
    with open_source(path) as source:
        kinds = uniform_kinds(source, bits, 32 if bits == 4 else 0)
        plain = [name for name in kinds if name in values][::3]
        kinds = {name: kind for name, kind in kinds.items() if name not in plain}
        plan = make_plan(source, None, Cast.INTEGERS, integers=kinds)
        convert(source, plan, tmp_path / "q", workers=1)
        with open_source(tmp_path / "q") as written:
            verify_against(source, plan, written, workers=1)
            assert not check_tensors(written) and not list(source_warnings(written))
            assert layouts(written) == {Layout.PACKED}
            for name in plain:
                assert written.tensors[name].dtype == "BF16"
                error = np.abs(values_of(written, name) - values[name]).max()
                assert error <= np.abs(values[name]).max() / 256
    config = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert config["format"] == "pack-quantized"


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_plain_int8_is_repacked(dtype: str, tmp_path: Path) -> None:
    """Integers and scales stay: no value is rounded a second time."""
    path, tensors, _ = integer_checkpoint(tmp_path / "hf", "int8")
    if dtype == "F32":
        for name, (stored, shape, data) in tensors.items():
            if name.endswith("weight_scale"):
                assert stored == "BF16"
                finer = from_bf16(np.frombuffer(data, np.uint16)) * np.float32(1.0001)
                tensors[name] = "F32", shape, finer.tobytes()
        with_config(path, tensors, "int8")
    with open_source(path) as source:
        plan = make_plan(source, None, Cast.INTEGERS, integers=uniform_kinds(source, 8, 0))
        convert(source, plan, tmp_path / "q", workers=2)
        with open_source(tmp_path / "q") as written:
            assert not check_tensors(written) and not list(source_warnings(written))
            assert layouts(written) == {Layout.PACKED}
            verify_against(source, plan, written, workers=1)
            name = f"{DOWN}.weight"
            assert np.array_equal(values_of(written, name), values_of(source, name))
            scale = f"{DOWN}.weight_scale"
            assert written.tensors[scale].dtype == dtype
            assert written.read(scale) == source.read(scale)


@pytest.mark.parametrize("form", ["int8", "packed8", "int4-64", "awq"])
@pytest.mark.parametrize("is_nested", [True, False])
def test_the_config_of_a_checkpoint_that_is_not_cast(
    form: str, is_nested: bool, tmp_path: Path
) -> None:
    """Keep the stated quantization_config of a multi-modal model, or describe the tensors."""
    path, tensors, values = integer_checkpoint(tmp_path / "hf", form)
    key = "modules_to_not_convert" if form == "awq" else "ignore"
    inner = json.loads((path / "config.json").read_text())
    inner["quantization_config"][key] = ["lm_head", "a.module.of.theirs"]
    if is_nested:
        outer = {"model_type": "kimi_vl", "text_config": inner}
        (path / "config.json").write_text(json.dumps(outer))
        config = None
    else:
        (tmp_path / "given.json").write_text(json.dumps(inner))
        (path / "config.json").unlink()
        config = load_model_config(tmp_path / "given.json")
    with open_source(path, config) as source:
        convert(source, make_plan(source, None), tmp_path / "out", workers=1)
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    if is_nested:
        assert written == inner["quantization_config"]
    else:
        assert written["quant_method"] == inner["quantization_config"]["quant_method"]
        quantized = {name.removesuffix(".weight") for name in values}
        assert "lm_head" in written[key] and not quantized & set(written[key])
        assert written.get("format") == inner["quantization_config"].get("format")
    with open_source(tmp_path / "out") as source:
        assert not check_tensors(source) and not list(source_warnings(source))
        assert {n: source.read(n) for n in source.tensors} == {n: t[2] for n, t in tensors.items()}


@pytest.mark.parametrize("form", ["int8", "int4-32", "awq"])
def test_the_name_of_scales_that_are_not_finite(form: str, tmp_path: Path) -> None:
    path, tensors, _ = integer_checkpoint(tmp_path / "hf", form)
    name = f"{DOWN}.scales" if form == "awq" else f"{DOWN}.weight_scale"
    dtype, shape, data = tensors[name]
    tensors[name] = dtype, shape, b"\xff\x7f" + data[2:]
    with_config(path, tensors, form)
    with open_source(path) as source:
        plan = make_plan(source, None, Cast.BF16)
        with pytest.raises(CheckpointError, match=rf"tensor {name} cannot be cast: .*NaN"):
            convert(source, plan, tmp_path / "q", workers=1)


def test_a_stated_shape_that_is_wrong(tmp_path: Path) -> None:
    path, tensors, _ = integer_checkpoint(tmp_path / "hf", "int4-32")
    name = f"{DOWN}.weight_shape"
    tensors[name] = "I64", (2,), np.array([192, 320]).tobytes()
    with_config(path, tensors, "int4-32")
    words = rf"tensor {name} says \[192, 320\], but the weight is \[320, 192\]; export it again"
    with open_source(path) as source:
        with pytest.raises(CheckpointError, match=words):
            convert(source, make_plan(source, None, Cast.BF16), tmp_path / "q", workers=1)
        layout = ParallelConfig()
        mesh = Mesh(layout, torch.device("cpu"), SingleRank(), SingleRank(), SingleRank(), 1)
        model = Transformer(source.config, mesh, WeightFormat(torch.float32, mesh.device))
        with pytest.raises(CheckpointError, match=words):
            load_weights(source, model.targets(), layout)


@pytest.mark.parametrize(("form", "other"), [("awq", "int4-32"), ("int4-32", "awq")])
def test_the_config_of_another_format_is_a_warning(form: str, other: str, tmp_path: Path) -> None:
    path, tensors, _ = integer_checkpoint(tmp_path / "hf", form)
    with_config(path, tensors, other)
    with open_source(path) as source:
        assert not check_tensors(source)
        (line,) = source_warnings(source)
        assert "they are read as stored" in line
        convert(source, make_plan(source, None), tmp_path / "out", workers=1)
    with open_source(tmp_path / "out") as source:
        assert not list(source_warnings(source))
