import pytest
import torch

from dsv3_kernels import act_quant
from dsv3_kernels.gemm.act_quant import launch_act_quant
from dsv3_kernels.testing import assert_bitwise_equal


def test_one_block_by_hand() -> None:
    x = torch.zeros(2, 256)
    x[0, 3], x[0, 4], x[1, 128] = -896.0, 1.0, 1.0
    q, scale = act_quant(x)
    tiny = torch.tensor(1e-4) / 448
    assert scale.tolist() == [[2.0, float(tiny)], [float(tiny), float(torch.tensor(1.0) / 448)]]
    assert q.float()[0, 3:5].tolist() == [-448.0, 0.5] and q.float()[1, 128] == 448
    # 1.0001 / 448 lies above 2^-9 (448 = 7 * 64): up to 2^-8.
    assert act_quant(torch.full((1, 128), 1.0001), ue8m0=True).scale.item() == 2.0**-8
    assert act_quant(torch.full((1, 128), 448.0), ue8m0=True).scale.item() == 1.0
    assert act_quant(torch.full((1, 128), 448.1), ue8m0=True).scale.item() == 2.0


@pytest.mark.parametrize("ue8m0", [False, True])
def test_values_come_back(ue8m0: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(63, 384) * torch.logspace(-8, 8, 63)[:, None]
    q, scale = act_quant(x, ue8m0)
    assert q.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
    back = q.float() * scale.repeat_interleave(128, -1)
    # Three mantissa bits; below the normal range, half of the smallest step.
    bound = (x.abs() / 16).maximum(scale.repeat_interleave(128, -1) * 2**-10)
    assert ((back - x).abs() <= bound * 1.0001).all()
    if ue8m0:
        assert (scale.log2() == scale.log2().round()).all()


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 128), (3, 640), (63, 256), (2, 5, 128)])
def test_triton(shape: tuple[int, ...], dtype: torch.dtype, ue8m0: bool) -> None:
    torch.manual_seed(1)
    x = (torch.randn(shape) * torch.randn(*shape[:-1], 1).exp() * 3).to(dtype)
    x.view(-1, 128)[0] = 0
    got, want = act_quant.kernel(x, ue8m0), act_quant.reference(x, ue8m0)
    assert_bitwise_equal("scale", got.scale, want.scale)
    assert_bitwise_equal("q", got.q, want.q)
    assert [t.shape for t in act_quant.kernel(x[:0], ue8m0)] == [t[:0].shape for t in want]


def test_rows_do_not_see_each_other() -> None:
    torch.manual_seed(2)
    x = torch.randn(40, 256)
    for op in (act_quant, act_quant.kernel):
        whole, part = op(x), op(x[17:19])
        assert_bitwise_equal("q", part.q, whole.q[17:19])
        assert_bitwise_equal("scale", part.scale, whole.scale[17:19])


def test_rows_of_no_group_are_left_alone() -> None:
    torch.manual_seed(3)
    x = torch.randn(40, 256)
    start, count = torch.tensor([0, 5, 9], dtype=torch.int32), torch.tensor([5, 4, 12]).int()
    got, want = launch_act_quant(x, False, start, count), act_quant.kernel(x)
    assert_bitwise_equal("values", got.q[:21].view(torch.uint8), want.q[:21].view(torch.uint8))
    assert_bitwise_equal("scales", got.scale[:21], want.scale[:21])
    assert bool(got.scale[21:].isnan().all()), "as `torch.empty` left them"
    none = launch_act_quant(x, False, start[:1], 0 * count[:1])
    assert bool(none.scale.isnan().all())
