"""A capture that fails, on a GPU or in a dry run: its bucket runs eagerly, others are captured."""

import logging
from dataclasses import replace

import torch
from torch import Tensor

from benchlib.rank_share import Rank, RankShape
from benchlib.step_shape import StepKind
from dsv3.config_files import DEMO, load_model_config
from dsv3.engine import cuda_graphs
from dsv3.engine.cuda_graphs import GraphRunner
from dsv3.engine.sampler import Sampler

BAD_ROWS = 2


def check_failed_capture(device: torch.device) -> None:
    """Read a value on the host in steps of two rows; run steps of one, two and four rows."""
    config = replace(load_model_config(DEMO), vocab_size=300)
    rank = Rank(RankShape(config=config, world=2, layers=2, weights="bf16"), device, 1024)
    runner, lines = rank.new_runner(), []
    steps, greedy, main = runner._static, Sampler.greedy, torch.cuda.current_stream()
    assert isinstance(steps, GraphRunner)

    def looking(self: Sampler, logits_MW: Tensor) -> Tensor:
        if len(logits_MW) == BAD_ROWS:
            logits_MW.sum().item()
        return greedy(self, logits_MW)

    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    cuda_graphs.log.addHandler(handler)
    Sampler.greedy = looking  # type: ignore[method-assign]
    try:
        for rows in (1, BAD_ROWS, 4, BAD_ROWS, 1):
            plan = rank.plan(StepKind(rows, 100, 1))
            tokens = [runner.run([plan]).token_M.tolist() for _ in range(3)]
            assert tokens[0] == tokens[1] == tokens[2], "eager, eager or captured, captured"
            assert torch.cuda.current_stream() == main
    finally:
        Sampler.greedy = greedy  # type: ignore[method-assign]
        cuda_graphs.log.removeHandler(handler)
    assert {bucket.rows for bucket in steps._graphs} == {1, 4}
    assert {bucket.rows for bucket in steps._failed} == {BAD_ROWS}
    (line,) = lines
    assert line.startswith("greedy steps of 2 tokens and 16 pages a sequence run eagerly: ")
    assert "\n" not in line


if __name__ == "__main__":
    check_failed_capture(torch.device("cuda"))
