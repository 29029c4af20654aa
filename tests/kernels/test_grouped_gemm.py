import pytest
import torch
from torch import Tensor

from dsv3_kernels.gemm.act_quant import Quantized, act_quant, dequantize
from dsv3_kernels.moe import grouped_gemm
from dsv3_kernels.moe.grouped_down import grouped_down
from dsv3_kernels.moe.grouped_gate_up import grouped_gate_up
from dsv3_kernels.moe.grouped_gemm import Launch, Stack, Tile
from dsv3_kernels.moe.permute import Groups, LocalExperts, permute
from dsv3_kernels.testing import assert_bitwise_equal, assert_close

E, D, F = 6, 256, 128
FP8 = torch.float8_e4m3fn
# Everything that `_tile` returns for some numbers of rows, and for either product.
TILES = [
    Tile(*shape, 4, 3, 1)
    for shape in ((16, 32), (16, 64), (32, 32), (64, 32), (64, 64), (64, 128), (128, 128))
]


def stack(rows: int, cols: int, kind: str) -> Stack:
    w = torch.randn(E, rows, cols)
    if kind.endswith("fp8"):
        scale = torch.rand(E, -(-rows // 128), -(-cols // 128)) * 0.01 + 1e-3
        return Stack((w * 20).to(FP8), scale)
    return Stack(w.to(torch.bfloat16) if kind == "bf16" else w)


def activations(rows: int, cols: int, kind: str) -> Tensor | Quantized:
    x = torch.randn(rows, cols)
    return act_quant(x) if kind == "fp8" else x.bfloat16() if kind.startswith("bf16") else x


def routed(tokens: int, k: int = 3) -> Groups:
    """Entries of ten experts, the middle six of them here; the first has none."""
    ids = torch.stack([torch.randperm(7)[:k] + 3 for _ in range(tokens)])
    return permute(ids, LocalExperts(2, E))


def rows_of(groups: Groups) -> Tensor:
    pairs = zip(groups.start_E.tolist(), groups.count_E.tolist(), strict=True)
    return torch.cat([torch.arange(start, start + count) for start, count in pairs])


def unweighted(groups: Groups) -> Tensor:
    """Return weights of 1 for all entries."""
    return torch.ones(groups.row_TK.shape, device=groups.row_TK.device)


TOLERANCE = {"float32": 1e-6, "float32 fp8": 1e-6, "bf16": 0.02, "bf16 fp8": 0.02, "fp8": 1e-6}


CASES = [(kind, tile) for kind in TOLERANCE for tile in (TILES[1], TILES[4])]


@pytest.mark.parametrize(("kind", "tile"), [*CASES, ("fp8", TILES[0]), ("fp8", TILES[6])], ids=str)
def test_products(kind: str, tile: Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(grouped_gemm, "_tile", lambda *args: tile)
    groups = routed(9)
    rows = rows_of(groups)
    assert 0 < len(rows) < 27 and int(groups.count_E[0]) == 0
    x, gate_up, down = activations(9, D, kind), stack(2 * F, D, kind), stack(D, F, kind)
    h = grouped_gate_up.kernel(x, gate_up, groups, 1)
    want = grouped_gate_up.reference(x, gate_up, groups, 1)
    assert type(h) is type(want)
    # A quantized value may be one step off where its float32 lies at the edge of two.
    assert_close(
        "h", dequantize(h)[rows], dequantize(want)[rows], 0.03 if kind == "fp8" else TOLERANCE[kind]
    )
    weight = torch.rand(9, 3)
    y = grouped_down.kernel(want, down, groups, 1, torch.float32, weight)
    want_y = grouped_down.reference(want, down, groups, 1, torch.float32, weight)
    assert y.shape == (27, D) and y.dtype == torch.float32
    assert_close("y", y[rows], want_y[rows], TOLERANCE[kind])


@pytest.mark.parametrize("kind", ["bf16", "bf16 fp8", "fp8"])
def test_matrices_through_descriptors(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Hopper; a tile may reach into the next expert's rows, or behind the last."""
    torch.manual_seed(6)
    monkeypatch.setattr(grouped_gemm, "_tile", lambda *args: TILES[6])
    groups = routed(9)
    rows = rows_of(groups)
    x, gate_up = activations(9, D, kind), stack(2 * F, D, kind)
    h, down = activations(27, F, kind), stack(200, F, kind)
    pointers = grouped_gate_up.kernel(x, gate_up, groups, 1)
    pointers_y = grouped_down.kernel(h, down, groups, 1, torch.float32, unweighted(groups))
    monkeypatch.setattr(Launch, "uses_tma", lambda self: True)
    got = grouped_gate_up.kernel(x, gate_up, groups, 1)
    assert_bitwise_equal("h", dequantize(got)[rows], dequantize(pointers)[rows])
    got = grouped_down.kernel(h, down, groups, 1, torch.float32, unweighted(groups))
    assert_bitwise_equal("y", got[rows], pointers_y[rows])


@pytest.mark.parametrize("kind", ["float32", "bf16"])
@pytest.mark.parametrize(("hidden", "inner"), [(24, 10), (100, 72)])
def test_ragged_matrices(
    kind: str, hidden: int, inner: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither side need be a multiple of anything where matrices are float."""
    torch.manual_seed(1)
    groups = routed(5)
    rows = rows_of(groups)
    x, gate_up, down = (
        activations(5, hidden, kind),
        stack(2 * inner, hidden, kind),
        stack(hidden, inner, kind),
    )
    want = grouped_gate_up.reference(x, gate_up, groups, 1)
    for tile in (TILES[0], TILES[4]):
        monkeypatch.setattr(grouped_gemm, "_tile", lambda *args, tile=tile: tile)
        h = grouped_gate_up.kernel(x, gate_up, groups, 1)
        assert_close("h", h[rows], want[rows], TOLERANCE[kind])
        y = grouped_down.kernel(want, down, groups, 1, torch.float32, unweighted(groups))
        want_y = grouped_down.reference(want, down, groups, 1, torch.float32, unweighted(groups))
        assert_close("y", y[rows], want_y[rows], TOLERANCE[kind])


@pytest.mark.parametrize("kind", ["float32", "fp8"])
def test_rows_of_no_expert_are_not_read(kind: str) -> None:
    torch.manual_seed(2)
    groups = routed(9)
    rows = rows_of(groups)
    h, down = activations(27, F, kind), stack(D, F, kind)
    unused = torch.ones(27, dtype=torch.bool)
    unused[rows] = False
    assert bool(unused.any())
    if isinstance(h, Quantized):
        h.q.view(torch.uint8)[unused] = 0x7F
        h.scale[unused] = float("nan")
    else:
        h[unused] = float("nan")
    y = grouped_down.kernel(h, down, groups, 3, torch.float32, unweighted(groups))
    want = grouped_down.reference(h, down, groups, 1, torch.float32, unweighted(groups))
    assert_close("y", y[rows], want[rows], 1e-6)


def whole_numbers(rows: int, cols: int, experts: int) -> tuple[Quantized, Stack]:
    """FP8 numbers whose products are added without rounding, in whatever order, inside a block."""
    x = torch.randint(-8, 9, (rows, cols)).to(FP8)
    w = torch.randint(-8, 9, (experts, 2 * F, cols)).to(FP8)
    scale = torch.rand(experts, 2 * F // 128, cols // 128) + 0.5
    return Quantized(x, torch.rand(rows, cols // 128) + 0.5), Stack(w, scale)


def test_a_row_depends_on_nothing_but_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the tile, its place in it, the other rows, or how many there are."""
    torch.manual_seed(3)
    x, w = whole_numbers(24, 256, 2)
    groups = permute(torch.arange(24)[:, None] // 5 % 2, LocalExperts(0, 2))
    results = []
    for tile in (TILES[0], TILES[2], TILES[4], TILES[6]):
        monkeypatch.setattr(grouped_gemm, "_tile", lambda *args, tile=tile: tile)
        results.append(grouped_down.kernel(x, w, groups, 1, torch.float32, unweighted(groups)))
        assert_bitwise_equal(f"{tile}", results[-1], results[0])
        alone = permute(torch.zeros(1, 1, dtype=torch.int64), LocalExperts(0, 2))
        for expert in (0, 1):
            row = int(groups.start_E[expert]) + 7
            one = Quantized(x.q[row : row + 1], x.scale[row : row + 1])
            assert w.block_scale is not None
            mine = Stack(
                w.weight[expert].expand(2, -1, -1).contiguous(), w.block_scale[[expert] * 2]
            )
            got = grouped_down.kernel(one, mine, alone, 1, torch.float32, unweighted(alone))
            assert_bitwise_equal("alone", got, results[0][row : row + 1])


@pytest.mark.parametrize("tile", [TILES[2], TILES[4], TILES[6]], ids=str)
def test_the_quantized_bits_do_not_depend_on_the_tile(
    tile: Tile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fused into a wide tile, or done by a second launch."""
    torch.manual_seed(4)
    x, w = whole_numbers(9, D, E)
    x.scale.mul_(0.01)
    groups = routed(9, 1)
    rows = rows_of(groups)
    first = grouped_gate_up.kernel(x, w, groups, 1)
    monkeypatch.setattr(grouped_gemm, "_tile", lambda *args: tile)
    other = grouped_gate_up.kernel(x, w, groups, 1)
    assert isinstance(first, Quantized) and isinstance(other, Quantized)
    assert_bitwise_equal("q", other.q[rows], first.q[rows])
    assert_bitwise_equal("scale", other.scale[rows], first.scale[rows])


def test_nothing_to_do() -> None:
    groups = permute(torch.full((4, 2), -1), LocalExperts(0, E))
    w = stack(2 * F, D, "float32")
    some = grouped_gate_up.kernel(torch.randn(4, D), w, groups, 1)
    assert isinstance(some, Tensor) and some.shape == (8, F)
    groups = permute(torch.empty((0, 2), dtype=torch.int64), LocalExperts(0, E))
    nothing = grouped_gate_up.kernel(torch.empty(0, D), w, groups, 1)
    assert isinstance(nothing, Tensor) and nothing.shape == (0, F)
    none = grouped_down.kernel(torch.empty(0, D), w, groups, 1, torch.bfloat16, unweighted(groups))
    assert none.shape == (0, 2 * F) and none.dtype == torch.bfloat16
