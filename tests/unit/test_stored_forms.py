"""Supported spellings of a checkpoint, and errors that name unsupported forms of weights."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dsv3.checkpoint.check import check_tensors
from dsv3.checkpoint.contradictions import source_warnings
from dsv3.checkpoint.convert import convert
from dsv3.checkpoint.directory import INDEX
from dsv3.checkpoint.plan import make_plan
from dsv3.checkpoint.scales import read_scales
from dsv3.checkpoint.source import check_stored_form, open_source
from dsv3.errors import CheckpointError
from tests.checkpoint_files import FP8, TINY, Tensors, random_tensors, write_file, write_hf

CONFIG = dataclasses.replace(TINY, quantization=FP8)
Q_A = "model.layers.0.self_attn.q_a_proj"


def read_as(path: Path, tensors: Tensors) -> list[str]:
    """Check that a directory has these tensors; return the warnings."""
    with open_source(path) as source:
        assert check_tensors(source) == ()
        assert source.tensors.keys() == tensors.keys()
        for name, (dtype, shape, data) in tensors.items():
            info = source.tensors[name]
            assert (info.dtype, info.shape) == (dtype, shape), name
            assert bytes(source.read(name)) == data, name
        return list(source_warnings(source))


def nested(name: str) -> str:
    return name if name.startswith("lm_head") else name.replace("model.", "model.language_model.")


@pytest.mark.parametrize(
    "spell",
    [
        lambda name: name.removeprefix("model."),
        lambda name: f"language_model.{name}",
        nested,
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace(".weight_scale_inv", ".weight_scale"),
    ],
    ids=["no model.", "language_model.", "model.language_model.", "module.", "weight_scale"],
)
def test_other_names(spell: Callable[[str], str], tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG)
    spelled = {spell(name): tensor for name, tensor in tensors.items()}
    assert spelled.keys() != tensors.keys()
    assert read_as(write_hf(tmp_path, CONFIG, spelled), tensors) == []


def test_rotary_tables_are_ignored(tmp_path: Path) -> None:
    tensors = random_tensors(TINY)
    table = ("F32", (8,), bytes(32))
    more = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": table for i in range(2)}
    more["model.rotary_emb.inv_freq"] = more["rotary_emb.original_inv_freq"] = table
    assert read_as(write_hf(tmp_path, TINY, tensors | more), tensors) == []


def test_an_image_encoder_is_ignored_with_a_warning(tmp_path: Path) -> None:
    tensors = random_tensors(TINY)
    spelled = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    spelled["vision_tower.patch_embed.weight"] = "I8", (2, 3, 4), bytes(24)
    spelled["model.mm_projector.0.weight"] = "BF16", (2,), bytes(4)
    (line,) = read_as(write_hf(tmp_path, TINY, spelled), tensors)
    assert "the tensors of an image encoder (2) are ignored" in line


def test_the_text_model_of_a_multi_modal_model_is_converted(tmp_path: Path) -> None:
    """The converted directory describes the text model alone."""
    tensors = random_tensors(CONFIG)
    path = write_hf(tmp_path / "hf", CONFIG, {f"language_model.{n}": t for n, t in tensors.items()})
    inner = json.loads((path / "config.json").read_text())
    outer = {"model_type": "kimi_vl", "text_config": inner}
    (path / "config.json").write_text(json.dumps(outer))
    assert read_as(path, tensors) == []
    with open_source(path) as source:
        convert(source, make_plan(source, None), tmp_path / "out", workers=1)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == inner
    assert read_as(tmp_path / "out", tensors) == []


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("lm_head.weight", "language_model.lm_head.weight"),
        ("model.norm.weight", "norm.weight"),
        (f"{Q_A}.weight_scale_inv", f"{Q_A}.weight_scale"),
    ],
)
def test_a_tensor_stored_twice(first: str, second: str, tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG)
    tensors[second] = tensors[first]
    with pytest.raises(CheckpointError, match=f"tensor {first} is stored twice, as ") as caught:
        open_source(write_hf(tmp_path, CONFIG, tensors))
    assert first in str(caught.value) and second in str(caught.value)


def move(path: Path, place: str) -> None:
    """Move the second file of a directory, and update the index."""
    index = json.loads((path / INDEX).read_text())
    name = "model-00002-of-00003.safetensors"
    new = path / place
    new.parent.mkdir(exist_ok=True)
    (path / name).rename(new)
    places = index["weight_map"].items()
    index["weight_map"] = {n: place if file == name else file for n, file in places}
    (path / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("place", ["./a.safetensors", "weights/a.safetensors", "./w/./a.st"])
def test_files_in_folders(place: str, tmp_path: Path) -> None:
    tensors = random_tensors(TINY)
    move(write_hf(tmp_path, TINY, tensors), place)
    assert read_as(tmp_path, tensors) == []


def test_a_link_to_a_file_elsewhere(tmp_path: Path) -> None:
    """As in a cache of the Hugging Face hub."""
    tensors = random_tensors(TINY)
    path = write_hf(tmp_path / "snapshot", TINY, tensors)
    (path / "model-00001-of-00003.safetensors").rename(tmp_path / "blob")
    (path / "model-00001-of-00003.safetensors").symlink_to("../blob")
    assert read_as(path, tensors) == []


@pytest.mark.parametrize("place", ["../a.safetensors", "w/../../a.safetensors", "/a.safetensors"])
def test_files_outside(place: str, tmp_path: Path) -> None:
    path = write_hf(tmp_path / "hf", TINY, random_tensors(TINY))
    index = json.loads((path / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = place
    (path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"{INDEX}: not an index"):
        open_source(path)


W = "model.layers.0.mlp.down_proj"
FORMS: list[tuple[str, dict[str, tuple[str, tuple[int, ...]]]]] = [
    ("MLX 4-bit", {f"{W}.weight": ("U32", (8, 4)), f"{W}.scales": ("BF16", (8, 1))}),
    ("NVFP4", {f"{W}.weight": ("U8", (8, 4)), f"{W}.weight_scale_2": ("F32", ())}),
    ("NVFP4", {f"{W}.weight_packed": ("U8", (8, 4)), f"{W}.weight_global_scale": ("F32", (1,))}),
    ("GPTQ", {f"{W}.qweight": ("I32", (1, 8)), f"{W}.g_idx": ("I32", (8,))}),
    (
        "asymmetric",
        {f"{W}.weight_packed": ("I32", (8, 1)), f"{W}.weight_zero_point": ("I32", (1,))},
    ),
    ("permuted order", {f"{W}.weight": ("I8", (8, 4)), f"{W}.weight_g_idx": ("I32", (4,))}),
    ("bitsandbytes 4-bit", {f"{W}.weight": ("U8", (8, 1)), f"{W}.weight.absmax": ("F32", (1,))}),
    ("bitsandbytes INT8", {f"{W}.weight": ("I8", (8, 4)), f"{W}.SCB": ("F32", (8,))}),
    ("LoRA", {f"{W}.lora_A.weight": ("F32", (8, 4))}),
    ("LoRA", {f"{W}.lora_B.default.weight": ("F32", (8, 4))}),
    ("LoRA", {f"{W}.lora_magnitude_vector.default.weight": ("F32", (8,))}),
    ("EXL3", {f"{W}.trellis": ("I16", (8, 4)), f"{W}.suh": ("F16", (8,))}),
    ("EXL2", {f"{W}.q_weight": ("I32", (8, 4)), f"{W}.q_scale": ("I32", (8,))}),
    ("AQLM", {f"{W}.codes": ("I8", (8, 4)), f"{W}.codebooks": ("F16", (1, 8))}),
    ("quanto", {f"{W}.weight._data": ("I8", (8, 4)), f"{W}.weight._scale": ("F32", (8,))}),
    ("sparse", {f"{W}.compressed": ("BF16", (4,)), f"{W}.bitmask": ("U8", (4,))}),
    ("static activation scales", {f"{W}.input_scale": ("F32", ())}),
    ("MXFP4", {"model.layers.1.mlp.experts.gate_up_proj_blocks": ("U8", (1, 2))}),
    ("e5m2", {f"{W}.weight": ("F8_E5M2", (8, 4))}),
    ("fnuz", {f"{W}.weight": ("F8_E4M3FNUZ", (8, 4))}),
    ("packed 4-bit", {f"{W}.weight": ("F4", (8, 4))}),
    ("6-bit", {f"{W}.weight": ("F6_E2M3", (8, 4))}),
    ("INT8 weights", {"model.layers.1.mlp.experts.gate_up_proj": ("I8", (8, 4, 4))}),
]


def bare(path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> Path:
    """One file, and neither config nor tokenizer."""
    bits = {"F32": 32, "I32": 32, "U32": 32, "F4": 4, "F6_E2M3": 6}
    bits |= dict.fromkeys(("BF16", "F16", "I16", "U16"), 16)
    header, data = {}, b""
    for name, (dtype, shape) in tensors.items():
        count = 1
        for size in shape:
            count *= size
        part = bytes(count * bits.get(dtype, 8) // 8)
        offsets = [len(data), len(data) + len(part)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += part
    text = json.dumps(header).encode()
    path.mkdir()
    (path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize(("form", "tensors"), FORMS)
def test_unsupported_forms(
    form: str, tensors: dict[str, tuple[str, tuple[int, ...]]], tmp_path: Path
) -> None:
    """Headers are enough to name them: the directory has neither config nor tokenizer."""
    path = bare(tmp_path / "bare", tensors)
    messages = []
    for check in (check_stored_form, open_source):
        with pytest.raises(CheckpointError, match=f"{form}.* not supported") as caught:
            check(path)
        messages.append(str(caught.value))
    assert messages[0] == messages[1] and "damaged" not in messages[0] and "\n" not in messages[0]
    assert any(name in messages[0] for name in tensors)


@pytest.mark.parametrize("dtype", ["U16", "U64", "C64", "I16", "F64", "BOOL"])
def test_other_dtypes_are_no_damage(dtype: str, tmp_path: Path) -> None:
    tensors = random_tensors(TINY)
    width = {"U16": 2, "I16": 2, "BOOL": 1}.get(dtype, 8)
    tensors["model.norm.weight"] = dtype, (320,), bytes(320 * width)
    with (
        open_source(write_hf(tmp_path, TINY, tensors)) as source,
        pytest.raises(CheckpointError, match=f"model.norm.weight cannot be of type {dtype}"),
    ):
        check_tensors(source)


def test_a_dtype_of_tomorrow(tmp_path: Path) -> None:
    text = json.dumps({"x": {"dtype": "F2", "shape": [4], "data_offsets": [0, 1]}}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"1")
    with pytest.raises(CheckpointError, match="tensor x is F2, which is not read"):
        check_stored_form(tmp_path)


@pytest.mark.parametrize("scale", [".weight_scale", ".weight_scale_inv"])
@pytest.mark.parametrize(
    ("shape", "words"),
    [((), "a scale per tensor"), ((1, 1), "a scale per tensor"), ((136, 1), "a scale per row")],
)
def test_scales_of_no_blocks(
    scale: str, shape: tuple[int, ...], words: str, tmp_path: Path
) -> None:
    tensors = random_tensors(CONFIG)
    del tensors[f"{Q_A}.weight_scale_inv"]
    size = 4 * 136 if len(shape) > 1 and shape[0] > 1 else 4
    tensors[Q_A + scale] = "F32", shape, bytes(size)
    with (
        open_source(write_hf(tmp_path, CONFIG, tensors)) as source,
        pytest.raises(CheckpointError, match=rf"{words} are not supported.*\[2, 3\]"),
    ):
        check_tensors(source)


def test_bytes_are_powers_of_two_where_the_config_says_so(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG)
    tensors[f"{Q_A}.weight_scale_inv"] = "U8", (2, 3), bytes([127, 128, 129, 0, 1, 2])
    region = ((0, 2), (0, 3))
    powers = dataclasses.replace(CONFIG, quantization=dataclasses.replace(FP8, scale_fmt="ue8m0"))
    with open_source(write_hf(tmp_path / "a", powers, tensors)) as source:
        check_tensors(source)
        assert read_scales(source, f"{Q_A}.weight", region)[0].tolist() == [1, 2, 4]
    with (
        open_source(write_hf(tmp_path / "b", CONFIG, tensors)) as source,
        pytest.raises(CheckpointError, match="weight_scale_inv is U8; scales are read as"),
    ):
        check_tensors(source)


def test_scales_of_integers(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG)
    tensors[f"{Q_A}.weight_scale_inv"] = "U16", (2, 3), bytes(12)
    with (
        open_source(write_hf(tmp_path, CONFIG, tensors)) as source,
        pytest.raises(CheckpointError, match="weight_scale_inv is U16; scales are read as"),
    ):
        check_tensors(source)


def test_rank_files_that_do_not_fit_together(tmp_path: Path) -> None:
    """DeepSeek's converter makes slices of one dtype, equal but in the dim that is split."""
    for rank, cols in enumerate((320, 319)):
        head: Tensors = {"head.weight": ("BF16", (4, cols), bytes(8 * cols))}
        write_file(tmp_path / f"model{rank}-mp2.safetensors", head)
    words = r"the rank files do not fit together: tensor lm_head.weight is .*320.*319"
    with pytest.raises(CheckpointError, match=words):
        open_source(tmp_path, CONFIG)


def test_a_file_name_with_an_absurd_number_of_ranks(tmp_path: Path) -> None:
    write_file(tmp_path / "model0-mp999999999999.safetensors", {})
    with pytest.raises(CheckpointError, match=r"model1-mp999999999999.safetensors: missing; the"):
        open_source(tmp_path, CONFIG)


def test_a_tensor_name_with_an_absurd_layer(tmp_path: Path) -> None:
    name = f"model.layers.{'9' * 5000}.x"
    tensors = random_tensors(TINY) | {name: ("F32", (1,), bytes(4))}
    with (
        open_source(write_hf(tmp_path, TINY, tensors)) as source,
        pytest.raises(CheckpointError, match="is not part of this model"),
    ):
        check_tensors(source)
