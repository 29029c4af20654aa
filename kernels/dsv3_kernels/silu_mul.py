"""The gated activation between the two projections of an MLP."""

from torch import Tensor
from torch.nn import functional as F


def silu_mul_ref(gate_up_TF: Tensor) -> Tensor:
    """Define `silu_mul`."""
    gate, up = gate_up_TF.chunk(2, -1)
    return (F.silu(gate.float()) * up.float()).to(gate_up_TF.dtype)


def silu_mul(gate_up_TF: Tensor) -> Tensor:
    """Return silu(gate) * up, computed in float32.

    Args:
        gate_up_TF: [..., 2F], the gate projection in the first half, the up projection after it.

    Returns:
        [..., F], same dtype.
    """
    return silu_mul_ref(gate_up_TF)
