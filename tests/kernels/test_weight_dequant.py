import pytest
import torch
from torch import Tensor

from dsv3_kernels import weight_dequant
from dsv3_kernels.testing import assert_bitwise_equal, assert_close

# kv_a_proj_with_mqa of V3 has 576 rows: four and a half blocks.
ROWS, COLS = 576, 300


@pytest.fixture(scope="module")
def weight() -> tuple[Tensor, Tensor, Tensor]:
    """An FP8 weight, its scales, and every value multiplied by hand."""
    torch.manual_seed(0)
    w = torch.randn(ROWS, COLS).mul(20).to(torch.float8_e4m3fn)
    scale = torch.rand(5, 3) + 0.01
    whole = w.float()
    for i in range(ROWS):
        for j in range(0, COLS, 128):
            whole[i, j : j + 128] *= scale[i // 128, j // 128]
    return w, scale, whole


@pytest.mark.parametrize(
    ("rows", "cols"),
    [
        ((0, 576), (0, 300)),
        ((512, 576), (256, 300)),  # only the ragged blocks
        ((100, 400), (0, 300)),  # begins and ends inside blocks
        ((127, 129), (130, 131)),
        ((144, 288), (64, 192)),
        ((5, 5), (0, 300)),  # nothing
    ],
)
def test_any_rectangle(
    weight: tuple[Tensor, Tensor, Tensor], rows: tuple[int, int], cols: tuple[int, int]
) -> None:
    w, scale, whole = weight
    covering = scale[rows[0] // 128 : -(-rows[1] // 128), cols[0] // 128 : -(-cols[1] // 128)]
    part = (slice(*rows), slice(*cols))
    got = weight_dequant(w[part], covering, torch.float32, rows[0] % 128, cols[0] % 128)
    assert_bitwise_equal("rectangle", got, whole[part])
    got = weight_dequant.kernel(w[part], covering, torch.float32, rows[0] % 128, cols[0] % 128)
    assert_bitwise_equal("triton", got, whole[part])
    got = weight_dequant(w[part], covering, torch.bfloat16, rows[0] % 128, cols[0] % 128)
    assert_bitwise_equal("bf16", got, whole[part].bfloat16())


def test_stacked_weights(weight: tuple[Tensor, Tensor, Tensor]) -> None:
    w, scale, whole = weight
    got = weight_dequant(torch.stack((w, w)), torch.stack((scale, 2 * scale)), torch.float32)
    assert_bitwise_equal("stack", got, torch.stack((whole, 2 * whole)))
    w, scale = w[:200, :130], scale[:2, :2]
    got = weight_dequant.kernel(torch.stack((w, w)), torch.stack((scale, 2 * scale)), torch.float32)
    want = torch.stack((whole, 2 * whole))[:, :200, :130]
    assert_bitwise_equal("stack in triton", got, want)
    half = weight_dequant.kernel(w, scale, torch.bfloat16)
    assert_close("the interpreter rounds wrongly", half, want[0], 2**-7)


def test_other_blocks() -> None:
    w = torch.ones(5, 6).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    got = weight_dequant(w, scale, torch.float32, 0, 1, (2, 4))
    want = scale.repeat_interleave(2, 0).repeat_interleave(4, 1)[:5, 1:7]
    assert_bitwise_equal("blocks of 2 x 4", got, want)
    got = weight_dequant.kernel(w, scale, torch.float32, 0, 1, (2, 4))
    assert_bitwise_equal("triton", got, want)


@pytest.mark.parametrize("cols", [256, 300])
def test_too_few_scales_are_refused(cols: int) -> None:
    w = torch.zeros(128, cols).to(torch.float8_e4m3fn)
    with pytest.raises(RuntimeError, match=r"narrow|length"):
        weight_dequant(w, torch.ones(1, 1), torch.float32)
