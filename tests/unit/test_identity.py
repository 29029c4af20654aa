"""Identity and fingerprint are the same in every layout, and differ for other weights."""

from functools import reduce
from operator import xor
from pathlib import Path

import pytest

from dsv3.checkpoint.convert import convert
from dsv3.checkpoint.identity import model_fingerprint, model_identity
from dsv3.checkpoint.plan import make_plan
from dsv3.checkpoint.source import open_source
from dsv3.config import ParallelConfig
from tests.checkpoint_files import TINY, random_tensors, write_hf


def name_of(path: Path, numerics: str = "float32") -> str:
    with open_source(path) as source:
        return model_fingerprint(source, numerics)


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


def identity_of(path: Path, num_parts: int = 1) -> int:
    with open_source(path) as source:
        return reduce(xor, (model_identity(source, part, num_parts) for part in range(num_parts)))


@pytest.mark.parametrize("is_small", [True, False])
def test_the_identity_of_all_weights(
    tmp_path: Path, is_small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for all layouts and worlds; another for other weights, wherever they differ."""
    if not is_small:
        monkeypatch.setattr("dsv3.checkpoint.identity._SMALL_BYTES", 0)
    tensors = random_tensors(TINY)
    identity = identity_of(write_hf(tmp_path / "model", TINY, tensors))
    assert identity_of(write_hf(tmp_path / "one", TINY, tensors, files=1), 3) == identity
    with open_source(tmp_path / "model") as source:
        plan = make_plan(source, ParallelConfig(world_size=4))
        convert(source, plan, tmp_path / "mp4", workers=1)
    (tmp_path / "mp4" / "config.json").write_bytes((tmp_path / "one/config.json").read_bytes())
    assert identity_of(tmp_path / "mp4", 4) == identity
    seen = {identity}
    for name in ("model.layers.1.mlp.experts.5.down_proj.weight", "model.norm.weight"):
        dtype, shape, data = tensors[name]
        tuned = {**tensors, name: (dtype, shape, bytes(reversed(data)))}
        seen.add(identity_of(write_hf(tmp_path / name, TINY, tuned)))
    assert len(seen) == 3
    dtype, shape, data = tensors["lm_head.weight"]
    middle = len(data) // 2
    tuned = {
        **tensors,
        "lm_head.weight": (dtype, shape, data[:middle] + b"\0" + data[middle + 1 :]),
    }
    assert (identity_of(write_hf(tmp_path / "byte", TINY, tuned)) != identity) == is_small
