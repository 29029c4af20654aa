"""A model's fingerprint is its own: whatever the layout, and for no other weights."""

from pathlib import Path

from dsv3.checkpoint.convert import convert
from dsv3.checkpoint.fingerprint import fingerprint
from dsv3.checkpoint.plan import make_plan
from dsv3.checkpoint.source import open_source
from dsv3.config import ParallelConfig
from tests.checkpoint_files import TINY, random_tensors, write_hf


def name_of(path: Path, numerics: str = "float32") -> str:
    with open_source(path) as source:
        return fingerprint(source, numerics)


def test_every_layout_of_a_checkpoint_has_one_fingerprint(tmp_path: Path) -> None:
    tensors = random_tensors(TINY)
    name = name_of(write_hf(tmp_path / "three", TINY, tensors))
    assert name.startswith("dsv3-") and len(name) == 17
    assert name_of(write_hf(tmp_path / "one", TINY, tensors, files=1)) == name
    with open_source(tmp_path / "three") as source:
        plan = make_plan(source, ParallelConfig(world_size=4))
        convert(source, plan, tmp_path / "mp4", workers=1)
    (tmp_path / "mp4" / "config.json").write_bytes((tmp_path / "one/config.json").read_bytes())
    assert name_of(tmp_path / "mp4") == name


def test_other_weights_or_numerics_have_another(tmp_path: Path) -> None:
    tensors = random_tensors(TINY)
    path = write_hf(tmp_path / "model", TINY, tensors)
    tuned = random_tensors(TINY)
    name = "model.layers.1.mlp.experts.0.down_proj.weight"
    dtype, shape, data = tuned[name]
    tuned[name] = dtype, shape, bytes(reversed(data))
    names = {
        name_of(path),
        name_of(path, "bfloat16"),
        name_of(write_hf(tmp_path / "tuned", TINY, tuned)),
        name_of(write_hf(tmp_path / "other", TINY, random_tensors(TINY, seed=1))),
    }
    assert len(names) == 4
