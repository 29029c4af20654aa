import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv3_kernels import PageTables, Paging, mha_decode
from dsv3_kernels.attention.mha_decode import launch_mha_decode
from dsv3_kernels.testing import assert_bitwise_equal, assert_close
from tests.kernels.definitions import attend
from tests.kernels.paged import scatter

H, X, V = 3, 12, 7
PAGING = Paging(16)
Op = Callable[..., Tensor]


def make(lengths: list[int]) -> tuple[list[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Keys with values of each sequence, then queries, cache and page tables."""
    torch.manual_seed(0)
    kv = [torch.randn(n, H, X + V) for n in lengths]
    return kv, (torch.randn(len(lengths), H, X), *scatter([e.flatten(1) for e in kv], PAGING))


def decode(
    q: Tensor, cache: Tensor, page: Tensor, query_pos: Tensor, op: Op = mha_decode
) -> Tensor:
    return op(q, cache, PageTables(page, query_pos[:, None], PAGING), 0.25)


def by_kernel(q: Tensor, cache: Tensor, page: Tensor, query_pos: Tensor, split: int) -> Tensor:
    return launch_mha_decode(q, cache, PageTables(page, query_pos[:, None], PAGING), 0.25, split)


@pytest.mark.parametrize("ahead", [0, 2])
def test_mha_decode(ahead: int) -> None:
    """`ahead`: keys cached behind the query's own position, which it must not see."""
    lengths = [3, 64, 33]
    kv, args = make(lengths)
    query_pos = torch.tensor(lengths) - 1 - ahead
    got = decode(*args, query_pos)
    assert got.dtype == torch.float32
    for b, n in enumerate(lengths):
        for h in range(H):
            k, v = kv[b][: n - ahead, h].split([X, V], -1)
            want, _ = attend(args[0][b, h], k, v, 0.25)
            assert_close(f"{b} {h}", got[b, h], want, 1e-5)


def test_padding_rows_see_nothing() -> None:
    _, args = make([20, 3])
    want = decode(*args, torch.tensor([19, 2]))
    got = decode(*args, torch.tensor([19, -1]))
    assert_close("the other row", got[0], want[0], 1e-6)
    assert bool((got[1] == 0).all())


def test_many_sequences_go_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [5, 64, 33, 7, 1]
    _, args = make(lengths)
    query_pos = torch.tensor(lengths) - 1
    whole = decode(*args, query_pos)
    monkeypatch.setattr(
        sys.modules["dsv3_kernels.attention.mha_decode"], "_SCORES", 2 * 80 * args[1].shape[1]
    )
    assert_close("two at a time", decode(*args, query_pos), whole, 1e-6)


@pytest.mark.parametrize("lengths", [[1], [3, 63, 130], [300, 16]])
def test_kernel(lengths: list[int]) -> None:
    """With a padding row; the first sequence alone is bit for bit the same."""
    _, (q, cache, page) = make([*lengths, 5])
    query_pos = torch.tensor([*lengths, 0]) - 1
    args = q, cache, page, query_pos
    got, want = by_kernel(*args, split=64), decode(*args, op=mha_decode.reference)
    assert_close("kernel", got, want, 2e-6)
    assert bool((got[-1] == 0).all())
    width = -(-lengths[0] // PAGING.page_size)
    alone = by_kernel(q[:1], cache, page[:1, :width], query_pos[:1], split=64)
    assert_bitwise_equal("alone", alone, got[:1])


def test_wide_tables_go_a_few_sequences_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [3, 63, 130]
    _, (q, cache, page) = make(lengths)
    query_pos = torch.tensor(lengths) - 1
    want = by_kernel(q, cache, page, query_pos, 16)
    launches = []
    module = sys.modules["dsv3_kernels.attention.mha_decode"]
    monkeypatch.setattr(sys.modules["dsv3_kernels.attention._decode_tiles"], "_SPLIT_BYTES", 1)
    several = module.programs_for

    def counted(*args: Any) -> Any:
        launches.append(args)
        return several(*args)

    monkeypatch.setattr(module, "programs_for", counted)
    assert_bitwise_equal("one at a time", by_kernel(q, cache, page, query_pos, 16), want)
    assert len(launches) == len(lengths)


def test_a_long_sequence_among_short_ones_is_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """With bfloat16 splits become longer; the first parts of sequences follow their contexts."""
    lengths = [3, 63, 700, 1, 40, 1]
    _, (q, cache, page) = make(lengths)
    args = q, cache.bfloat16().nan_to_num(0.5), page, torch.tensor(lengths) - 1
    args = args[0].bfloat16(), *args[1:]
    module, firsts = sys.modules["dsv3_kernels.attention.mha_decode"], []
    merge = module.merge_splits

    def merged(*given: Any) -> None:
        firsts.append(given[1].tolist())
        merge(*given)

    monkeypatch.setattr(module, "merge_splits", merged)
    tiles = sys.modules["dsv3_kernels.attention._decode_tiles"]
    monkeypatch.setattr(tiles, "_SPLIT_BYTES", 4 * H * V * 30)
    want = decode(*args, op=mha_decode.reference)
    assert_close("one launch", by_kernel(*args, split=32), want, 2e-6)
    # 808 positions over 24 spare parts: splits of 64.
    assert firsts == [[0, 1, 2, 13, 14, 15, 16]]
