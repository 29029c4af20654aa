from collections.abc import Callable
from typing import Any

import pytest
import torch

from dsv3_kernels.moe.router_logits import router_logits
from dsv3_kernels.testing import assert_bitwise_equal, assert_close

Op = Callable[..., Any]  # an operation or one of its implementations


@pytest.mark.parametrize("form", [router_logits, router_logits.kernel])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "hidden", "experts"), [(1, 1024, 256), (63, 200, 72), (0, 64, 8), (300, 64, 8)]
)
def test_router_logits(
    tokens: int, hidden: int, experts: int, dtype: torch.dtype, form: Op
) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(tokens, hidden).to(dtype), torch.randn(experts, hidden)
    got = form(x, w)
    assert got.dtype == torch.float32 and got.dim() == 3
    # The weights are used whole, not rounded to the type of the activations.
    assert_close("logits", got.sum(0), x.double() @ w.double().T, 1e-6)


def test_the_sum_does_not_depend_on_the_tokens() -> None:
    """One program per part and one for all parts agree; sums within a part are exact."""
    torch.manual_seed(1)
    scale = torch.tensor([1.0, 2.0**-12, 2.0**13, 0.125]).repeat_interleave(128)
    x = torch.randint(-8, 9, (300, 512)) * scale
    w = torch.randint(-8, 9, (8, 512)).float()
    whole = router_logits.kernel(x, w)
    few = router_logits.kernel(x[7:10], w)
    assert len(whole) == 1 and len(few) == 16
    total = torch.zeros(3, 8)
    for part in few:
        total += part
    assert_bitwise_equal("sum", total, whole[0, 7:10])


@pytest.mark.parametrize("form", [router_logits.reference, router_logits.kernel])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_weights_give_the_bits_of_float32(
    dtype: torch.dtype, form: Callable[..., torch.Tensor]
) -> None:
    torch.manual_seed(2)
    x, w = torch.randn(17, 200).to(dtype), torch.randn(72, 200).bfloat16()
    assert_bitwise_equal("logits", form(x, w), form(x, w.float()))
