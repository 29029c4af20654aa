"""How products of few rows are shared out, at published shapes."""

import pytest
import torch

from dsv3_kernels.gemm._split_k import ROWS, WANTED, SplitK, make_locks, splits_of

SHAPES = [(2112, 7168), (3072, 1536), (4096, 512), (7168, 2048), (512, 7168), (7168, 256)]
SHAPES += [(4608, 7168), (7168, 2304), (24576, 1536), (7168, 16384), (16160, 7168)]
SHARED = 228 << 10


@pytest.mark.parametrize(("N", "K"), SHAPES)
@pytest.mark.parametrize("step", [64, 128])
def test_all_programs_run_at_once_and_read_enough(N: int, K: int, step: int) -> None:
    locks = make_locks(torch.empty(N, 1, device="meta"))
    for M in (1, 32, 64, 128):
        y = torch.empty(M, N, device="meta")
        shares = SplitK.of(y, K // step, 128, locks)
        tiles, splits, m_tiles = shares.grid(M, N)
        assert m_tiles == 1 and tiles == len(locks) and splits == splits_of(N, K // step)
        assert splits * shares.blocks * step >= K
        held, stages = -(-tiles * splits // WANTED), shares.stages(y)
        assert held <= 3 and 2 <= stages <= shares.blocks + 1
        if held < 3 or M < 128:  # of 128 rows registers hold but two
            assert held * stages * 128 * (ROWS + shares.rows) < SHARED
        # Bytes of W under way, unless that is all there are.
        under_way = tiles * splits * min(stages - 1, shares.blocks) * 128 * ROWS
        assert under_way >= min(2.5e6, N * K * 128 // step)


def test_who_sums() -> None:
    locks, blocks = make_locks(torch.empty(2112, 1)), 56
    assert splits_of(2112, blocks) == 4
    for M, locked in ((1, True), (128, True), (129, False)):
        y = torch.empty(M, 2112, device="meta")
        assert SplitK.of(y, blocks, 128, locks).locked == locked
        assert not SplitK.of(y, blocks, 128, None).locked
    wide = torch.empty(64, 512, device="meta")  # 14 splits are more than one program should read
    assert not SplitK.of(wide, blocks, 128, locks).locked
    assert SplitK.of(wide[:32], blocks, 128, locks).locked
    assert not SplitK.of(wide, 7, 128, locks).part.numel()
