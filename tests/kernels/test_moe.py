import pytest
import torch
from torch import Tensor

from dsv3_kernels import experts
from dsv3_kernels.testing import assert_close

T, D, F, E, K = 19, 24, 10, 8, 3


@pytest.fixture(scope="module")
def layer():
    torch.manual_seed(0)
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(T)])
    return torch.randn(T, D), ids, torch.rand(T, K), torch.randn(E, 2 * F, D), torch.randn(E, D, F)


def dense(layer: tuple[Tensor, ...], held: range) -> Tensor:
    """Sum weight * down(silu(gate) * up), token by token, expert by expert."""
    x, ids, weight, gate_up, down = (t.double() if t.is_floating_point() else t for t in layer)
    y = torch.zeros(T, D, dtype=torch.float64)
    for t in range(T):
        for e, w in zip(ids[t].tolist(), weight[t], strict=True):
            if e in held:
                gate, up = gate_up[e, :F] @ x[t], gate_up[e, F:] @ x[t]
                y[t] += w * (down[e] @ (gate * torch.sigmoid(gate) * up))
    return y


@pytest.mark.parametrize("held", [range(8), range(4), range(4, 8), range(6, 7)], ids=str)
def test_local_experts(layer, held: range) -> None:
    x, ids, weight, gate_up, down = layer
    first = held.start
    got = experts(
        x, ids, weight, first, len(held), lambda e: gate_up[first + e], lambda e: down[first + e]
    )
    assert got.dtype == torch.float32
    assert_close("experts", got, dense(layer, held), 1e-5)


def test_no_local_expert_hit(layer) -> None:
    x, _, weight, *_ = layer

    def never(e: int) -> Tensor:
        raise AssertionError(f"expert {e} was not chosen")

    far = torch.tensor([[0, 1, 7]]).expand(T, K)
    assert torch.equal(experts(x, far, weight, 2, 5, never, never), torch.zeros(T, D))
    empty = experts(x[:0], far[:0], weight[:0], 0, E, never, never)
    assert empty.shape == (0, D)


def test_one_expert_for_all_tokens(layer) -> None:
    """Whatever the imbalance, nothing is dropped."""
    x, _, weight, gate_up, down = layer
    ids = torch.tensor([[5, 1, 2]]).expand(T, K)
    got = experts(x, ids, weight, 0, E, lambda e: gate_up[e], lambda e: down[e])
    assert_close("experts", got, dense((x, ids, weight, gate_up, down), range(E)), 1e-5)
