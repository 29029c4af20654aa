"""Ranks sum through memory of each other: processes in the interpreter, and a world of one."""

from pathlib import Path

import pytest
import torch

from dsv3_kernels import Peers, fits_sum_norm, shared_bytes, sum_norm
from dsv3_kernels.ops.sum_norm import MAX_ROWS, sum_norm_of_parts
from dsv3_kernels.testing import assert_bitwise_equal, assert_close
from tests.distributed.ranks import CPU, alone, run_ranks
from tests.kernels.peers import check_all, check_answers, check_sums, make_memory, small_answers


def test_all_ranks_get_the_bits_of_the_reference(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "no waiting", tmp_path / "one buffer"):
        make_memory(folder, 2)
    run_ranks(check_all, 2, folder=tmp_path)


def test_turns_may_overflow(tmp_path: Path) -> None:
    make_memory(tmp_path, 4, turn=2**31 - 3)
    run_ranks(check_sums, 4, folder=tmp_path)


def test_a_model_gives_the_same_answers(tmp_path: Path) -> None:
    answers = small_answers(alone())
    make_memory(tmp_path, 2)
    greedy = {"greedy 0": answers["greedy 0"]}
    run_ranks(check_answers, 2, folder=tmp_path, want=greedy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_world_of_one(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    shared = torch.zeros(shared_bytes(1), dtype=torch.uint8)
    peers = Peers.at([shared.data_ptr()], 0, CPU)
    for rows, dim in ((1, 7), (5, 384), (2, 7168), (3, 130)):
        x, y = torch.randn(rows, dim), torch.randn(rows, dim).to(dtype)
        operands = x.to(dtype), y, torch.rand(dim) + 0.5, 1e-6
        total, h, q = sum_norm(*operands, peers)
        want = sum_norm_of_parts(operands[0], [y], *operands[2:])
        assert q is None and total.dtype == h.dtype == dtype
        # The interpreter rounds to bfloat16 wrongly, by one unit in the last place.
        tols = (0.0, 1e-6) if dtype == torch.float32 else (2**-7, 2**-6)
        assert_close("sum", total, want[0], tols[0])
        assert_close("norm", h, want[1], tols[1])
    # Rows do not see each other, nor which turn it is.
    alone = sum_norm(x[1:2], y[1:2].float(), operands[2], 1e-6, peers)
    whole = sum_norm(x, y.float(), operands[2], 1e-6, peers)
    assert_bitwise_equal("row", alone[1], whole[1][1:2])


def test_what_fits() -> None:
    one, most = torch.zeros(1, 8192), torch.zeros(MAX_ROWS, 4096).bfloat16()
    assert fits_sum_norm(one) and fits_sum_norm(most)
    wrong = [one.expand(17, -1), torch.zeros(1, 8193), one[:0], one.half(), one[None]]
    wrong.append(torch.zeros(MAX_ROWS + 1, 7))
    assert not any(fits_sum_norm(y) for y in wrong)
    with pytest.raises(AssertionError, match=r"x_TD\.shape"):
        sum_norm(one, wrong[1], one[0], 1e-6, Peers(one, 0, 0))
