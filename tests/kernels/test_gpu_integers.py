"""Products with integers on a real GPU (TRITON_INTERPRET=0), at V3's widths."""

import pytest
import torch

from dsv3_kernels import (
    Integers,
    LocalExperts,
    Stack,
    experts,
    int8_gemm,
    int8_quant,
    int_dequant,
    int_gemm,
    make_locks,
    permute,
)
from dsv3_kernels.moe.grouped_down import grouped_down
from dsv3_kernels.testing import assert_bitwise_equal, assert_close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
E, K, D, F = 8, 4, 7168, 2048
BF16 = torch.bfloat16
# bits, columns that share a scale (0 for a row), if groups have zeros.
FORMS = [(8, 0, False), (4, 32, False), (4, 128, True)]


def stack(count: int, rows: int, cols: int, bits: int, group: int, zeros: bool) -> Stack:
    group = group or cols
    shape = (count, rows, cols // group)
    scale = torch.rand(shape, device="cuda").add(0.5).mul(cols**-0.5 / 2 ** (bits - 2)).to(BF16)
    zero = torch.randint(0, 16, shape, dtype=torch.uint8, device="cuda") if zeros else None
    q_shape = (count, rows, cols * bits // 8)
    q = torch.randint(0, 256, q_shape, dtype=torch.uint8, device="cuda")
    return Stack(q if bits == 4 else q.view(torch.int8), scale, group, zero)


def matrix(rows: int, cols: int, bits: int, group: int, zeros: bool) -> Integers:
    return stack(1, rows, cols, bits, group, zeros).integers(0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [1, 3, 17, 64])
def test_few_rows(rows: int, form: tuple[int, int, bool]) -> None:
    torch.manual_seed(0)
    w, x = matrix(2112, D, *form), torch.randn(rows, D, device="cuda").to(BF16)
    assert_bitwise_equal(
        "matrix", int_dequant(w, torch.float32), int_dequant.reference(w, torch.float32)
    )
    locks = make_locks(w.q)
    got = int_gemm.kernel(x, w, torch.float32, locks)
    # float32 sums of 7,168 exact products in another order. Unmeasured.
    assert_close("y", got, int_gemm.reference(x, w, torch.float32), 1e-5)
    assert not locks.any()
    assert_bitwise_equal("last", int_gemm.kernel(x[-1:], w, torch.float32, locks), got[-1:])


@pytest.mark.parametrize("rows", [65, 1000])
def test_int8_rows(rows: int) -> None:
    torch.manual_seed(1)
    w, x = matrix(2112, D, 8, 0, False), torch.randn(rows, D, device="cuda").to(BF16)
    quantized, want = int8_quant(x), int8_quant.reference(x)
    assert_bitwise_equal("q", quantized.q, want.q)
    assert_bitwise_equal("scale", quantized.scale, want.scale)
    sums = quantized.q.double() @ w.q.double().T
    exact = sums * quantized.scale * w.scale.double().T
    assert_close("y", int8_gemm(quantized, w, torch.float32), exact, 1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [1, 63, 1024])
def test_experts(tokens: int, form: tuple[int, int, bool]) -> None:
    torch.manual_seed(2)
    gate_up, down = stack(E, 2 * F, D, *form), stack(E, D, F, *form)
    x = torch.randn(tokens, D, device="cuda").to(BF16)
    ids = torch.randint(-1, 2 * E, (tokens, K), device="cuda")
    weight = torch.rand(tokens, K, device="cuda")
    got = experts(x, ids, weight, 2, gate_up, down)
    assert_close("y", got, experts.reference(x, ids, weight, 2, gate_up, down), 0.02)
    if form == FORMS[0]:
        rows = int8_quant(x)
        got = experts(rows, ids, weight, 2, gate_up, down)
        assert_close("int8", got, experts.reference(rows, ids, weight, 2, gate_up, down), 0.02)


@pytest.mark.parametrize("form", FORMS)
def test_the_bits_of_every_tile(form: tuple[int, int, bool]) -> None:
    torch.manual_seed(3)
    w, h = stack(E, D, F, *form), torch.randn(600, F, device="cuda").to(BF16)
    groups = permute(torch.randint(0, E, (300, 2), device="cuda"), LocalExperts(0, E))
    weight = torch.rand(300, 2, device="cuda")
    results = [
        grouped_down.kernel(h, w, groups, rows, torch.float32, weight) for rows in (1, 20, 64, 256)
    ]
    for got in results:
        assert_bitwise_equal("y", got, results[0])
