"""Comparisons for tests and benchmarks; messages give the position and size of a difference."""

import numpy as np
import torch
from torch import Tensor


def assert_close(name: str, got: Tensor, want: Tensor, tol: float) -> None:
    """Raise unless |got - want| <= tol * max|want| everywhere; non-finite values must coincide."""
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, want {tuple(want.shape)}"
    got = got.double()
    want = want.double()
    finite = torch.isfinite(want)
    same = torch.where(finite, torch.isfinite(got), got.nan_to_num(7.0) == want.nan_to_num(7.0))
    assert bool(same.all()), f"{name}: non-finite values differ at {(~same).nonzero()[0].tolist()}"
    if not bool(finite.any()):
        return
    error = (got - want).abs().masked_fill(~finite, 0.0)
    scale = float(want[finite].abs().max()) or 1.0
    worst = int(error.argmax())
    where = [int(i) for i in np.unravel_index(worst, error.shape)]
    assert float(error.max()) <= tol * scale, (
        f"{name}: off by {float(error.max()):.3e} at {where} (got {float(got.flatten()[worst]):.6g}"
        f", want {float(want.flatten()[worst]):.6g}), allowed {tol:g} of {scale:.4g}; relative "
        f"norm {float(error.norm() / want[finite].norm().clamp_min(1e-30)):.3e}"
    )


def assert_bitwise_equal(name: str, got: Tensor, want: Tensor) -> None:
    """Raise unless both tensors hold the same bytes."""
    assert got.shape == want.shape and got.dtype == want.dtype, (
        f"{name}: {tuple(got.shape)} {got.dtype}, want {tuple(want.shape)} {want.dtype}"
    )
    # Not `contiguous()`, which leaves the strides of empty tensors as they are.
    a, b = (x.clone(memory_format=torch.contiguous_format).view(torch.uint8) for x in (got, want))
    assert torch.equal(a, b), f"{name}: bytes differ first at {(a != b).nonzero()[0].tolist()}"
