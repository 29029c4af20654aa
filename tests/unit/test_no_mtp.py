"""Conversions without the layers that draft tokens."""

import dataclasses
from pathlib import Path

from dsv3.checkpoint.convert import convert
from dsv3.checkpoint.plan import make_plan
from dsv3.checkpoint.report import describe
from dsv3.checkpoint.sharding import tensor_specs
from dsv3.checkpoint.source import open_source
from dsv3.config import ParallelConfig
from tests.checkpoint_files import TINY, random_tensors, write_hf

CONFIG = dataclasses.replace(TINY, num_nextn_predict_layers=1)


def test_all_but_the_mtp_layer(tmp_path: Path) -> None:
    mtp = {name for name, spec in tensor_specs(CONFIG).items() if spec.mtp}
    with open_source(write_hf(tmp_path / "hf", CONFIG, random_tensors(CONFIG))) as source:
        stored = set(source.tensors)
        assert mtp <= stored
        kept = make_plan(source, ParallelConfig(world_size=2))
        assert set(kept.tensors) == stored
        plan = make_plan(source, ParallelConfig(world_size=2), keeps_mtp=False)
        assert set(plan.tensors) == stored - mtp and plan.id != kept.id
        lines = [line for line in describe(source, plan, 0, 0) if line.startswith("mtp:")]
        assert len(lines) == 1 and f"{len(mtp)} tensors" in lines[0] and "left out" in lines[0]
        convert(source, plan, tmp_path / "mp2", workers=2)
    with open_source(tmp_path / "mp2") as source:
        assert set(source.tensors) == stored - mtp
        assert not [line for line in describe(source, plan, 0, 0) if line.startswith("mtp:")]
