"""convert.py as a program: kills, damage, wrong flags, each with an error of one line."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3.checkpoint.directory import INDEX
from dsv3.checkpoint.source import open_source
from dsv3.config_files import hf_config_dict
from dsv3.errors import CheckpointError
from tests.checkpoint_files import random_tensors, write_hf
from tests.faults.converting import CONFIG, Convert, contents
from tests.programs import ROOT
from tests.unit.test_source import EVEN, write_deepseek

SECOND = "model-00002-of-00003.safetensors"
Q_B = "model.layers.0.self_attn.q_b_proj.weight"


def test_convert_verify_and_again(hf: Path, tmp_path: Path, convert: Convert) -> None:
    target = tmp_path / "mp2"
    code, out, err = convert(hf, target, "--model-parallel", 2, "--n-experts", 8, "--verify")
    assert (code, err) == (0, "")
    assert "bit for bit" in out
    first = contents(target)
    assert sorted(first) == [
        "config.json",
        "manifest.json",
        "model0-mp2.safetensors",
        "model1-mp2.safetensors",
        "tokenizer.json",
    ]
    code, out, _ = convert(hf, target, "--model-parallel", 2)
    assert code == 0
    assert "bit for bit" in out
    assert contents(target) == first
    assert convert(target, None, "--verify")[0] == 0


def test_data_parallel_groups(hf: Path, tmp_path: Path, convert: Convert) -> None:
    """Every file holds all that its rank needs; the layout is in the manifest."""
    target = tmp_path / "tp2dp2"
    code, out, _ = convert(hf, target, "--tp", 2, "--dp", 2, "--dry-run")
    assert code == 0 and not target.exists()
    assert "for:  tp=2 x dp=2, experts over all ranks" in out
    assert "replicated in every group: " in out and out.count("-mp4.safetensors: ") == 4
    assert convert(hf, target, "--tp", 2, "--dp", 2, "--ep", 4, "--verify")[0] == 0
    manifest = json.loads((target / "manifest.json").read_text())
    assert manifest["layout"] == {"world_size": 4, "tp": 2, "dp": 2}
    shards = {name: t["shards"] for name, t in manifest["tensors"].items()}
    q_b = [s[:2] for s in shards["model.layers.0.self_attn.q_b_proj.weight"]]
    assert [rank for rank, _ in q_b] == [0, 1, 2, 3]
    assert q_b[0][1] == q_b[2][1] != q_b[1][1] == q_b[3][1]
    assert shards["model.layers.1.mlp.experts.5.down_proj.weight"] == [[2]]
    code, _, err = convert(hf, target, "--model-parallel", 4)
    assert code == 2 and "holds a conversion for 4 ranks (2 x 2), not for 4 ranks; give" in err
    again = tmp_path / "again"
    assert convert(target, again, "--ep", 4, "--dp", 2)[0] == 0
    assert contents(again) == contents(target)
    assert convert(target, tmp_path / "mp2", "--tp", 2)[0] == 0
    assert convert(hf, tmp_path / "direct", "--model-parallel", 2)[0] == 0
    assert contents(tmp_path / "mp2") == contents(tmp_path / "direct")


def test_another_checkpoint_is_in_the_way(hf: Path, tmp_path: Path, convert: Convert) -> None:
    target = tmp_path / "out"
    assert convert(hf, target, "--model-parallel", 2)[0] == 0
    first = contents(target)
    code, _, err = convert(hf, target, "--model-parallel", 4)
    assert (code, err.count("\n")) == (2, 1)
    assert "holds a conversion for 2 ranks, not for 4 ranks; give --overwrite" in err
    code, _, err = convert(hf, target, "--to", "hf")
    assert code == 2
    assert "for 2 ranks, not for Hugging Face" in err
    other = write_hf(tmp_path / "other", CONFIG, random_tensors(CONFIG, seed=1))
    code, _, err = convert(other, target, "--model-parallel", 2)
    assert code == 2
    assert "differs from" in err
    assert contents(target) == first
    assert convert(other, target, "--model-parallel", 4, "--overwrite", "--verify")[0] == 0
    assert not (target / "model0-mp2.safetensors").exists()
    code, _, err = convert(other, hf, "--to", "hf")
    assert code == 2
    assert contents(hf)


def fault_missing_file(hf: Path) -> str:
    (hf / SECOND).unlink()
    return SECOND


def fault_truncated(hf: Path) -> str:
    with (hf / SECOND).open("r+b") as file:
        file.truncate((hf / SECOND).stat().st_size - 1)
    return f"{SECOND}: truncated"


def fault_index(hf: Path) -> str:
    index = json.loads((hf / INDEX).read_text())
    index["weight_map"]["model.norm2.weight"] = SECOND
    (hf / INDEX).write_text(json.dumps(index))
    return f"{SECOND}: tensor model.norm2.weight is missing"


def fault_missing_scale(hf: Path) -> str:
    index = json.loads((hf / INDEX).read_text())
    del index["weight_map"][Q_B + "_scale_inv"]
    (hf / INDEX).write_text(json.dumps(index))
    return f"{Q_B}_scale_inv is missing"


def fault_config(hf: Path, **change: object) -> None:
    (hf / "config.json").write_text(json.dumps(hf_config_dict(CONFIG) | change))


def fault_wrong_shape(hf: Path) -> str:
    fault_config(hf, v_head_dim=32)
    return "the config makes it"


def fault_unknown_tensor(hf: Path) -> str:
    fault_config(hf, num_nextn_predict_layers=0)
    return "config.json says num_nextn_predict_layers=0"


def fault_distill(hf: Path) -> str:
    fault_config(hf, model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    return "model_type='qwen2' (Qwen2ForCausalLM) is not supported"


def fault_groups(hf: Path) -> str:
    fault_config(hf, quantization_config={"quant_method": "compressed-tensors"})
    return "config_groups=None lists no groups of weights"


FAULTS = [
    fault_missing_file,
    fault_truncated,
    fault_index,
    fault_missing_scale,
    fault_wrong_shape,
    fault_unknown_tensor,
    fault_distill,
    fault_groups,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_bad_input(fault: object, hf: Path, tmp_path: Path, convert: Convert) -> None:
    words = fault(hf)  # type: ignore[operator]
    code, _, err = convert(hf, tmp_path / "out", "--model-parallel", 2)
    assert code == 2
    assert words in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model-parallel", 3], "does not divide num_attention_heads=8"),
        (["--model-parallel", 0], "must be at least 1"),
        (["--model-parallel", 2, "--n-experts", 9], "the checkpoint has 8 experts"),
        (["--model-parallel", 2, "--config", "v3-671b"], "but --config says 129280"),
        (["--to", "fp8"], "no weights that are not FP8 already"),
        ([], "give --model-parallel N"),
        (["--to", "hf", "--model-parallel", 2], "leave --model-parallel out"),
        (["--to", "hf", "--dp", 2], "leave --model-parallel out, --tp, --dp"),
        (["--model-parallel", 2, "--dp", 2], "--model-parallel N is --tp N"),
        (["--tp", 2, "--dp", 2, "--ep", 8], "--ep=8 must be tp=2 x dp=2 = 4, or left out"),
        (["--tp", 3, "--dp", 2], "does not divide num_attention_heads=8"),
        (["--dp", 16], "world_size=16 does not divide n_routed_experts=8"),
        (["--tp", 2, "--dp", 0], "must be at least 1"),
        (["--to", "bf16", "--scale-fmt", "ue8m0"], "goes with --to fp8"),
    ],
)
def test_bad_flags(
    flags: list[object], words: str, hf: Path, tmp_path: Path, convert: Convert
) -> None:
    code, _, err = convert(hf, tmp_path / "out", *flags)
    assert code == 2
    assert words in err
    assert not (tmp_path / "out").exists()


def test_disk_too_small(
    hf: Path, tmp_path: Path, convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    code, _, err = convert(hf, tmp_path / "out", "--model-parallel", 2)
    assert code == 2
    assert "the disk has 1 MB free" in err
    code, out, err = convert(hf, tmp_path / "out", "--model-parallel", 2, "--dry-run")
    assert code == 2
    assert "begin inside a 128-block" in out
    assert not (tmp_path / "out").exists()


def test_dry_run_writes_nothing(hf: Path, tmp_path: Path, convert: Convert) -> None:
    code, out, _ = convert(hf, tmp_path / "out", "--to", "bf16", "--dry-run")
    assert code == 0
    assert "cast to BF16" in out
    assert not (tmp_path / "out").exists()


def test_no_tokenizer_is_a_warning(hf: Path, tmp_path: Path, convert: Convert) -> None:
    (hf / "tokenizer.json").unlink()
    code, _, err = convert(hf, tmp_path / "out", "--model-parallel", 2)
    assert code == 0
    assert "warning: " in err
    assert "no tokenizer files" in err


def test_side_files(hf: Path, tmp_path: Path, convert: Convert) -> None:
    (hf / "chat_template.jinja").write_text("x")
    (hf / "encoding").mkdir()
    (hf / "encoding" / "encode.py").write_text("y")
    (hf / "pytorch_model.bin").write_text("z")
    assert convert(hf, tmp_path / "out", "--to", "hf")[0] == 0
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "x"
    assert (tmp_path / "out" / "encoding" / "encode.py").read_text() == "y"
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()
    assert (tmp_path / "out" / "config.json").read_bytes() == (hf / "config.json").read_bytes()


def flip_byte(file: Path, offset: int = -1) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)


def read_pieces(folder: Path) -> None:
    """Loading at the world size of the conversion."""
    with open_source(folder) as source:
        for info in source.tensors.values():
            for piece in info.pieces:
                source.read(info.name, piece.region)


def test_damaged_results_are_found(hf: Path, tmp_path: Path, convert: Convert) -> None:
    target = tmp_path / "mp2"
    assert convert(hf, target, "--model-parallel", 2)[0] == 0
    flip_byte(target / "model1-mp2.safetensors")  # in the last expert
    for arguments in (
        (hf, target, "--model-parallel", 2, "--verify"),
        (target, None, "--verify"),
        (target, tmp_path / "again", "--model-parallel", 2),
        (target, tmp_path / "bf16", "--to", "bf16"),
    ):
        code, _, err = convert(*arguments)
        assert (code, err.count("\n")) == (2, 1)
        assert "model1-mp2.safetensors" in err
    with pytest.raises(CheckpointError, match="does not match its digest"):
        read_pieces(target)


def test_files_of_other_conversions_are_refused(hf: Path, tmp_path: Path, convert: Convert) -> None:
    mp2, other = tmp_path / "mp2", tmp_path / "other2"
    assert convert(hf, mp2, "--model-parallel", 2)[0] == 0
    other_hf = write_hf(tmp_path / "other", CONFIG, random_tensors(CONFIG, seed=1))
    assert convert(other_hf, other, "--model-parallel", 2)[0] == 0
    shutil.copy(other / "model1-mp2.safetensors", mp2)
    with pytest.raises(CheckpointError, match=r"model1-mp2.safetensors: not the file"):
        open_source(mp2)
    (mp2 / "model1-mp2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model1-mp2.safetensors: missing"):
        open_source(mp2)
    (mp2 / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"manifest.json: not a manifest"):
        open_source(mp2)


def test_a_manifest_of_the_first_version_is_read(
    hf: Path, tmp_path: Path, convert: Convert
) -> None:
    """It has a digest of each file, which is not compared."""
    mp2, again = tmp_path / "mp2", tmp_path / "again"
    assert convert(hf, mp2, "--model-parallel", 2)[0] == 0
    manifest = json.loads((mp2 / "manifest.json").read_text())
    manifest["version"] = 1
    for file in manifest["files"]:
        file["digest"] = "0" * 64
    (mp2 / "manifest.json").write_text(json.dumps(manifest))
    assert convert(mp2, None, "--verify")[0] == 0
    assert convert(mp2, again, "--to", "hf", "--verify")[0] == 0
    manifest["version"] = 3
    (mp2 / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"manifest.json: not a manifest that this version"):
        open_source(mp2)


def test_deepseek_directory(tmp_path: Path, convert: Convert) -> None:
    tensors = random_tensors(EVEN)
    theirs = write_deepseek(tmp_path / "theirs", tensors, 2)
    (tmp_path / "config.json").write_text(json.dumps(hf_config_dict(EVEN)))
    flags = ("--model-parallel", 4, "--config", tmp_path / "config.json")
    assert convert(theirs, tmp_path / "a", *flags)[0] == 0
    hf = write_hf(tmp_path / "hf", EVEN, tensors)
    assert convert(hf, tmp_path / "b", "--model-parallel", 4)[0] == 0
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert {name: a[name] for name in a if name[:5] in ("model", "manif")} == {
        name: b[name] for name in b if name[:5] in ("model", "manif")
    }
    code, _, err = convert(theirs, tmp_path / "c", "--model-parallel", 2)
    assert code == 2
    assert "give the model's configuration with --config" in err


def test_closed_standard_streams(hf: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "launch" / "convert.py"), "--hf-ckpt-path", str(hf)]
    command += ["--save-path", str(tmp_path / "out"), "--to", "hf"]
    job = f"{shlex.join(command)} <&- >&- 2>&-"
    assert subprocess.run(job, shell=True, check=False).returncode == 0
    open_source(tmp_path / "out").close()


@pytest.mark.parametrize("to", ["hf", "bf16"])
def test_a_hugging_face_directory_holds_its_digests(
    hf: Path, tmp_path: Path, convert: Convert, to: str
) -> None:
    """A converted directory can be verified without its source; damage is reported."""
    out = tmp_path / "out"
    assert convert(hf, out, "--to", to)[0] == 0
    code, text, err = convert(out, None, "--verify")
    assert (code, err) == (0, "") and text == f"verified: {out} matches the digests of its index\n"

    (file,) = out.glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    code, _, err = convert(out, None, "--verify")
    assert code == 2 and err.count("\n") == 1
    assert f"{file}: tensor " in err and f"does not match its digest in {INDEX}" in err

    file.write_bytes(whole.replace(b'"BF16"', b'"F16" ', 1))  # the same bytes, another type
    code, _, err = convert(out, None, "--verify")
    assert code == 2 and f"not the tensors that {out / INDEX} was written for" in err

    index = json.loads((out / INDEX).read_text())
    index["metadata"]["tensor_digests"] = ["x"]
    (out / INDEX).write_text(json.dumps(index))
    code, _, err = convert(out, None, "--verify")
    assert code == 2 and "its tensor_digests are damaged; convert again" in err


def test_a_directory_without_digests_is_not_verified(hf: Path, convert: Convert) -> None:
    """The line names the checked and the unchecked properties."""
    code, text, err = convert(hf, None, "--verify")
    assert (code, text) == (2, "") and err == (
        f"error: {hf}: complete, with the right names, types and shapes, but without digests to "
        "compare the bytes with; directories that convert.py has written hold them\n"
    )
    (hf / SECOND).unlink()
    assert f"{SECOND}: missing" in convert(hf, None, "--verify")[2]
