"""However a checkpoint travels between layouts, every byte comes back."""

import dataclasses
from pathlib import Path
from tempfile import TemporaryDirectory

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from dsv3.checkpoint import blocks
from dsv3.checkpoint.convert import convert
from dsv3.checkpoint.plan import make_plan
from dsv3.checkpoint.source import open_source
from dsv3.config import ParallelConfig
from tests.checkpoint_files import FP8, TINY, random_tensors, write_hf

LITE = dataclasses.replace(
    TINY,
    model_type="deepseek_v2",
    q_lora_rank=None,
    scoring_func="softmax",
    topk_method="group_limited_greedy",
    norm_topk_prob=False,
    n_shared_experts=2,
)
SPARSE = dataclasses.replace(
    TINY,
    model_type="deepseek_v32",
    index_n_heads=4,
    index_head_dim=32,
    index_topk=16,
    num_nextn_predict_layers=1,
    quantization=FP8,
)
CONFIGS = {
    "v2-lite": LITE,
    "v3": TINY,
    "v3-fp8": dataclasses.replace(TINY, quantization=FP8),
    "v3.2-fp8-mtp": SPARSE,
}
# (tp, dp); None: Hugging Face.
LAYOUTS = (None, (1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (2, 2), (1, 8), (4, 2))


def convert_to(source_path: Path, tp_dp: tuple[int, int] | None, target: Path) -> Path:
    layout = None
    if tp_dp is not None:
        tp, dp = tp_dp
        layout = ParallelConfig(world_size=tp * dp, tp=tp, dp=dp)
    with open_source(source_path) as source:
        convert(source, make_plan(source, layout), target, workers=2)
    return target


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("family", CONFIGS)
@settings(max_examples=5, deadline=None)
@given(
    route=st.lists(st.sampled_from(LAYOUTS), min_size=1, max_size=3), last=st.sampled_from(LAYOUTS)
)
def test_any_route_gives_the_same_files(
    family: str, route: list[tuple[int, int] | None], last: tuple[int, int] | None
) -> None:
    config = CONFIGS[family]
    tensors = random_tensors(config)
    with TemporaryDirectory() as folder:
        hf = write_hf(Path(folder) / "hf", config, tensors)
        direct = convert_to(hf, last, Path(folder) / "direct")
        path = hf
        for step, layout in enumerate(route):
            path = convert_to(path, layout, Path(folder) / str(step))
        assert contents(convert_to(path, last, Path(folder) / "end")) == contents(direct)
        with open_source(direct) as source:
            assert {name: bytes(source.read(name)) for name in source.tensors} == {
                name: data for name, (_, _, data) in tensors.items()
            }


def test_small_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes when every tensor takes many blocks."""
    hf = write_hf(tmp_path / "hf", SPARSE, random_tensors(SPARSE))
    direct = convert_to(hf, (2, 2), tmp_path / "direct")
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 700)
    assert contents(convert_to(hf, (2, 2), tmp_path / "blocks")) == contents(direct)
