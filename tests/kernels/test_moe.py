from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv3_kernels import LocalExperts, Stack, act_quant, experts, permute
from dsv3_kernels.testing import assert_bitwise_equal, assert_close

Op = Callable[..., Any]  # an operation or one of its implementations

T, D, F, E, K = 19, 24, 10, 8, 3


@pytest.fixture(scope="module")
def layer() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(T)])
    return torch.randn(T, D), ids, torch.rand(T, K), torch.randn(E, 2 * F, D), torch.randn(E, D, F)


def dense(layer: tuple[Tensor, ...], held: range) -> Tensor:
    """Sum weight * down(silu(gate) * up), token by token, expert by expert."""
    x, ids, weight, gate_up, down = (t.double() if t.is_floating_point() else t for t in layer)
    inner = down.shape[2]
    y = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(len(x)):
        for e, w in zip(ids[t].tolist(), weight[t], strict=True):
            if e in held:
                gate, up = gate_up[e, :inner] @ x[t], gate_up[e, inner:] @ x[t]
                y[t] += w * (down[e] @ (gate * torch.sigmoid(gate) * up))
    return y


def run(layer: tuple[Tensor, ...], held: range, form: Op = experts) -> Tensor:
    x, ids, weight, gate_up, down = layer
    part = slice(held.start, held.stop)
    return form(x, ids, weight, held.start, Stack(gate_up[part]), Stack(down[part]))


@pytest.mark.parametrize("form", [experts, experts.kernel])
@pytest.mark.parametrize("held", [range(8), range(4), range(4, 8), range(6, 7)], ids=str)
def test_local_experts(layer: tuple[Tensor, ...], held: range, form: Op) -> None:
    got = run(layer, held, form)
    assert got.dtype == torch.float32
    assert_close("experts", got, dense(layer, held), 1e-5)


@pytest.mark.parametrize("form", [experts, experts.kernel])
def test_no_local_expert_hit(layer: tuple[Tensor, ...], form: Op) -> None:
    x, ids, weight, gate_up, down = layer
    never = gate_up * float("nan"), down * float("nan")
    for far in (torch.tensor([[0, 1, 7]]).expand(T, K), torch.full((T, K), -1)):
        assert torch.equal(run((x, far, weight, *never), range(2, 7), form), torch.zeros(T, D))
    assert run((x[:0], ids[:0], weight[:0], *never), range(E), form).shape == (0, D)


def test_rows_among_other_bytes(layer: tuple[Tensor, ...]) -> None:
    """Tokens of other ranks come with their chosen experts behind them."""
    x, ids, weight, *matrices = layer
    parts = x, ids.int(), weight
    packed = torch.cat([part.view(torch.uint8) for part in parts], 1)
    x_part, ids_part, weight_part = packed.split([4 * D, 4 * K, 4 * K], 1)
    ids_part, weight_part = ids_part.view(torch.int32).long(), weight_part.view(torch.float32)
    among = x_part.view(torch.float32), ids_part, weight_part, *matrices
    assert not among[0].is_contiguous()
    want = run(layer, range(E), experts.kernel)
    assert_bitwise_equal("experts", run(among, range(E), experts.kernel), want)


@pytest.mark.parametrize("form", [experts, experts.kernel])
@pytest.mark.parametrize("tokens", [1, 19, 63])
def test_one_expert_for_all_tokens(layer: tuple[Tensor, ...], tokens: int, form: Op) -> None:
    """Whatever the imbalance, nothing is dropped."""
    *_, gate_up, down = layer
    torch.manual_seed(1)
    ids = torch.tensor([[5, 1, 2]]).expand(tokens, K)
    uneven = torch.randn(tokens, D), ids, torch.rand(tokens, K), gate_up, down
    assert_close("experts", run(uneven, range(E), form), dense(uneven, range(E)), 1e-5)


def fp8_layer(tokens: int) -> tuple[Tensor, Tensor, Tensor, Stack, Stack]:
    """The demo model's experts: D 256, F 128."""
    torch.manual_seed(2)

    def stack(rows: int, cols: int) -> Stack:
        scale = torch.rand(4, -(-rows // 128), -(-cols // 128)) * 0.01 + 1e-3
        return Stack(torch.randn(4, rows, cols).mul(20).to(torch.float8_e4m3fn), scale)

    ids = torch.randint(-1, 8, (tokens, 4))
    return torch.randn(tokens, 256), ids, torch.rand(tokens, 4), stack(256, 256), stack(256, 128)


@pytest.mark.parametrize(("quantized", "ue8m0"), [(False, False), (True, False), (True, True)])
def test_fp8_matrices(quantized: bool, ue8m0: bool) -> None:
    x, ids, weight, gate_up, down = fp8_layer(7)
    given = (act_quant(x, ue8m0) if quantized else x, ids, weight, 3, gate_up, down, ue8m0)
    want, got = experts.reference(*given), experts.kernel(*given)
    # Quantized, rows are added up in bfloat16 and a value may lie one step of FP8 away.
    assert_close("kernels", got, want, 0.01 if quantized else 1e-5)
    exact = [torch.stack([w.matrix(e, torch.float32) for e in range(4)]) for w in (gate_up, down)]
    plain = dense((x, ids - 3, weight, *exact), range(4))
    assert_close("definition", want, plain, 0.1 if quantized else 1e-5)
    rough = float((want - plain).abs().max() / plain.abs().max())
    assert (rough > 1e-3) == quantized, "quantized if and only if asked for"


@pytest.mark.parametrize("quantized", [False, True])
def test_tokens_do_not_see_each_other(quantized: bool) -> None:
    x, ids, weight, gate_up, down = fp8_layer(24)
    matrices = (2, gate_up, down, False, None, 4)  # the same tiles for 3 tokens as for 24
    given = act_quant if quantized else torch.clone
    whole = experts.kernel(given(x), ids, weight, *matrices)
    some = slice(17, 20)
    part = experts.kernel(given(x[some]), ids[some], weight[some], *matrices)
    assert_bitwise_equal("slice", part, whole[some])


def test_bfloat16(layer: tuple[Tensor, ...]) -> None:
    x, ids, weight, gate_up, down = (
        t.bfloat16() if t.dim() > 2 or t.shape == (T, D) else t for t in layer
    )
    small = (x, ids, weight, gate_up, down)
    assert_close("experts", run(small, range(E), experts.kernel), dense(small, range(E)), 0.02)


@pytest.mark.parametrize("form", [experts.reference, experts.kernel])
@pytest.mark.parametrize("first", [3, 100])
def test_what_else_is_summed_is_asked_for_last(form: Op, first: int) -> None:
    x, ids, weight, gate_up, down = fp8_layer(5)
    shared = torch.randn(5, 256).bfloat16()
    alone = form(x, ids, weight, first, gate_up, down)
    together = form(x, ids, weight, first, gate_up, down, False, lambda: shared)
    assert_bitwise_equal("sum", together, alone + shared)


def test_groups_may_be_known() -> None:
    x, ids, weight, gate_up, down = fp8_layer(9)
    more = 3, gate_up, down, False, None, 1
    want = experts.kernel(x, ids, weight, *more)
    local = LocalExperts(3, 4)
    same = experts.kernel(x, ids, weight, *more, permute(ids, local))
    assert_bitwise_equal("same", same, want)
    others = permute(ids.flip(0), local)
    assert not torch.equal(experts.kernel(x, ids, weight, *more, others), want)
