"""Steps on a real GPU (TRITON_INTERPRET=0): graphs give the results of the steps they captured."""

import pytest
import torch

from dsv3.config import ParallelConfig
from dsv3.config_files import DEMO
from dsv3.distributed.collectives import SingleRank
from dsv3.distributed.mesh import Mesh
from dsv3.engine.cuda_graphs import GraphRunner
from dsv3.engine.runner import BatchBuilder, Runner
from dsv3.engine.start import start
from dsv3.engine.step_plan import StepPlan
from dsv3.model.absorb_rule import AbsorbRule
from dsv3.settings import DispatchVariant, EngineConfig
from dsv3_kernels.testing import assert_bitwise_equal
from tests.distributed.test_static_groups import Answers, ask
from tests.kernels.failed_capture import check_failed_capture
from tests.kernels.test_captured_step import one_of_two_groups, step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize("form", ["allreduce", "alltoall"])
@torch.inference_mode()
def test_one_of_several_groups(form: DispatchVariant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another step in between does not show, nor that the group was idle once."""
    device = torch.device("cuda")
    rank = one_of_two_groups(form, device, monkeypatch)
    graphs = Runner(rank.model, rank.cache, AbsorbRule(1), static=True)._static
    plain = Runner(rank.model, rank.cache, AbsorbRule(1), static=True)._static
    assert isinstance(graphs, GraphRunner) and isinstance(plain, GraphRunner)
    plain._pool = None
    for drawn in (False, True, False, True):
        for plan in (step(drawn), StepPlan(), step(drawn)):
            tables = BatchBuilder(plan, rank.cache.layout, device, AbsorbRule(1)).token_tables()
            bucket = graphs.bucket([plan, step(drawn)])
            assert bucket is not None
            got, want = (steps.run(bucket, plan, tables) for steps in (graphs, plain))
            assert_bitwise_equal(form, got.token_M, want.token_M)
    assert len(graphs._graphs) == 2 and graphs.seconds > 0


def test_a_failed_capture_costs_its_bucket_only() -> None:
    check_failed_capture(torch.device("cuda"))


def answers(device: str) -> Answers:
    one = SingleRank()
    mesh = Mesh(ParallelConfig(), torch.device(device), one, one, one, 1)
    settings = EngineConfig(dtype="float32", max_seq_len=256, max_running=6, max_batch_tokens=64)
    started = start(DEMO, settings, mesh)
    assert started.engine is not None
    found = ask(started.engine)
    if device == "cuda":
        assert started.plan.activation_bytes > 0 and started.runner.capture_seconds > 0
        assert started.seconds.keys() == {"load", "cache", "warmup", "capture"}
    return {key: tokens for key, tokens in found.items() if int(key) % 2 == 0}


def test_the_demo_model_answers_as_on_a_cpu() -> None:
    """Greedily, from a cache as large as the measured steps leave room for."""
    assert answers("cuda") == answers("cpu")
