"""Products of rows with their experts' matrices of integers."""

import pytest
import torch
from torch import Tensor

from dsv3_kernels import experts
from dsv3_kernels.gemm.act_quant import Quantized, dequantize
from dsv3_kernels.gemm.int8_quant import int8_quant
from dsv3_kernels.moe import grouped_gemm
from dsv3_kernels.moe.grouped_down import grouped_down
from dsv3_kernels.moe.grouped_gate_up import grouped_gate_up
from dsv3_kernels.moe.grouped_gemm import Stack, Tile
from dsv3_kernels.moe.permute import LocalExperts, permute
from dsv3_kernels.testing import assert_bitwise_equal, assert_close
from tests.kernels.test_grouped_gemm import TILES, routed, rows_of, unweighted
from tests.kernels.test_integers import values

E = 6
BF16, FP32 = torch.bfloat16, torch.float32
# bits, columns that share a scale (0 for a row), if groups have zeros.
FORMS = [
    (8, 0, False),
    (8, 32, False),
    (4, 32, False),
    (4, 64, True),
    (4, 128, False),
    (4, 0, True),
]


def stack(rows: int, cols: int, bits: int, group: int, zeros: bool = False) -> Stack:
    groups = cols // (group or cols)
    scale = torch.rand(E, rows, groups).add(0.5).mul(cols**-0.5 / 2 ** (bits - 2)).to(BF16)
    zero = torch.randint(0, 16, (E, rows, groups), dtype=torch.uint8) if zeros else None
    q = torch.randint(0, 256, (E, rows, cols * bits // 8), dtype=torch.uint8)
    return Stack(q if bits == 4 else q.view(torch.int8), scale, group or cols, zero)


def exact(w: Stack) -> Tensor:
    """Return the matrices in float64."""
    return torch.stack([values(w.integers(e)) for e in range(E)])


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize(("bits", "group", "zeros"), FORMS)
def test_products(
    bits: int, group: int, zeros: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Columns end inside a step, features inside a tile; the first expert has no rows."""
    torch.manual_seed(0)
    groups = routed(9)
    rows = rows_of(groups)
    hidden, inner = (384, 256) if group else (200, 70)
    tolerance = 1e-5 if dtype == FP32 else 0.02
    x, gate_up = torch.randn(9, hidden).to(dtype), stack(2 * inner, hidden, bits, group, zeros)
    down = stack(hidden, inner, bits, group, zeros)
    want = grouped_gate_up.reference(x, gate_up, groups, 1)
    weight = torch.rand(9, 3)
    assert isinstance(want, Tensor)
    want_y = grouped_down.reference(want, down, groups, 1, FP32, weight)
    results = []
    for tile in (TILES[0], TILES[4]):
        monkeypatch.setattr(grouped_gemm, "_tile", lambda *args, tile=tile: tile)
        h = grouped_gate_up.kernel(x, gate_up, groups, 1)
        assert isinstance(h, Tensor) and h.dtype == dtype
        assert_close("h", h[rows], want[rows], tolerance)
        y = grouped_down.kernel(want, down, groups, 1, FP32, weight)
        assert_close("y", y[rows], want_y[rows], tolerance)
        results.append((h[rows], y[rows]))
    for name, first, second in zip("hy", *results, strict=True):
        assert_close(f"{name} of both tiles", first, second, 2**-8 if dtype == BF16 else 1e-6)


@pytest.mark.parametrize(("bits", "group", "zeros"), FORMS)
def test_definition(bits: int, group: int, zeros: bool) -> None:
    """The reference and the kernel against the values of the matrix, one by one."""
    torch.manual_seed(1)
    groups = routed(6)
    rows = rows_of(groups)
    w = stack(24, 128, bits, group, zeros)
    h = torch.randn(18, 128)
    matrix_of_row = exact(w).repeat_interleave(groups.count_E, 0)
    want = torch.einsum("mk,mnk->mn", h[rows].double(), matrix_of_row)
    for product in (grouped_down.reference, grouped_down.kernel):
        assert_close("y", product(h, w, groups, 1, FP32, unweighted(groups))[rows], want, 1e-5)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 17, 70])
def test_numbers_of_rows(tokens: int, dtype: torch.dtype) -> None:
    """As `experts` chooses tiles; most experts of one token have no rows."""
    torch.manual_seed(tokens)
    gate_up, down = stack(2 * 48, 96, 4, 32), stack(96, 48, 8, 0)
    x = torch.randn(tokens, 96).to(dtype)
    ids, weight = torch.randint(-1, E + 2, (tokens, 2)), torch.rand(tokens, 2)
    got = experts.kernel(x, ids, weight, 1, gate_up, down)
    want = experts.reference(x, ids, weight, 1, gate_up, down)
    assert_close("y", got, want, 1e-5 if dtype == FP32 else 0.02)


def test_a_row_depends_on_nothing_but_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    w = stack(100, 256, 4, 32)
    x = torch.randint(-8, 9, (24, 256)).to(BF16)
    groups = permute(torch.arange(24)[:, None] // 5 % 2, LocalExperts(0, E))
    results = []
    for tile in (TILES[0], TILES[2], TILES[4], TILES[6]):
        monkeypatch.setattr(grouped_gemm, "_tile", lambda *args, tile=tile: tile)
        results.append(grouped_down.kernel(x, w, groups, 1, FP32, unweighted(groups)))
        assert_bitwise_equal(f"{tile}", results[-1], results[0])
    row = int(groups.start_E[1]) + 7
    alone = permute(torch.ones(1, 1, dtype=torch.int64), LocalExperts(0, E))
    one = x[row : row + 1]
    got = grouped_down.kernel(one, w, alone, 1, FP32, unweighted(alone))
    assert_bitwise_equal("alone", got[0], results[0][row])


@pytest.mark.parametrize("tile", [TILES[3], TILES[4], TILES[6]], ids=str)
@pytest.mark.parametrize(("hidden", "inner"), [(256, 128), (200, 72)])
def test_int8_rows(hidden: int, inner: int, tile: Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of integers are exact, so only scaling rounds; rows between are quantized again."""
    torch.manual_seed(5)
    monkeypatch.setattr(grouped_gemm, "_tile", lambda *args: tile)
    groups = routed(9)
    rows = rows_of(groups)
    gate_up, down = stack(2 * inner, hidden, 8, 0), stack(hidden, inner, 8, 0)
    x = int8_quant(torch.randn(9, hidden))
    h = grouped_gate_up.kernel(x, gate_up, groups, 1)
    want = grouped_gate_up.reference(x, gate_up, groups, 1)
    assert isinstance(h, Quantized) and isinstance(want, Quantized)
    assert h.q.dtype == want.q.dtype == torch.int8 and h.scale.shape == (27, 1)
    assert_close("scale", h.scale[rows], want.scale[rows], 1e-6)
    # A value may be one step off where its float32 lies at the edge of two.
    assert (h.q[rows].int() - want.q[rows].int()).abs().max() <= 1
    assert_close("h", dequantize(h)[rows], dequantize(want)[rows], 0.01)
    y = grouped_down.kernel(want, down, groups, 1, FP32, unweighted(groups))
    sums = torch.einsum("mk,enk->emn", want.q.double(), down.weight.double())
    assert down.block_scale is not None
    for e, (start, count) in enumerate(
        zip(groups.start_E.tolist(), groups.count_E.tolist(), strict=True)
    ):
        mine = slice(start, start + count)
        exact_y = sums[e, mine] * want.scale[mine] * down.block_scale[e, :, 0].double()
        assert_close("y", y[mine], exact_y, 1e-6)
    want_y = grouped_down.reference(want, down, groups, 1, FP32, unweighted(groups))
    assert_close("reference", y[rows], want_y[rows], 1e-5)


@pytest.mark.parametrize("tokens", [3, 70])
def test_experts_of_int8_rows(tokens: int) -> None:
    torch.manual_seed(6)
    gate_up, down = stack(2 * 40, 96, 8, 0), stack(96, 40, 8, 0)
    x = int8_quant(torch.randn(tokens, 96))
    ids, weight = torch.randint(-1, E + 2, (tokens, 2)), torch.rand(tokens, 2)
    got = experts.kernel(x, ids, weight, 1, gate_up, down)
    want = experts.reference(x, ids, weight, 1, gate_up, down)
    assert_close("y", got, want, 0.02)  # a value of the rows between may be one step off
