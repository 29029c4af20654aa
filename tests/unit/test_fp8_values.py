"""Casts in numpy are those of torch, bit for bit."""

import numpy as np
import pytest
import torch

from dsv3.checkpoint.fp8_values import (
    dequantize,
    fp8_values,
    from_bf16,
    quantize,
    to_bf16,
    to_fp8,
)

RNG = np.random.default_rng(0)
EDGES = [0.0, -0.0, 448, -448, 2**-9, 2**-10, 1.5 * 2**-9, 2**-6, -(2**-7), 17, 19, 1e-30]
VALUES = np.concatenate(
    [RNG.standard_normal(20_000) * size for size in (1e-3, 1e-2, 1, 100)] + [EDGES]
).astype(np.float32)


def test_fp8_values() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    np.testing.assert_array_equal(fp8_values(), codes.float().numpy())


def test_rounding() -> None:
    x = torch.from_numpy(VALUES).clamp(-448, 448)
    np.testing.assert_array_equal(
        to_fp8(VALUES), x.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    )
    bf16 = torch.from_numpy(VALUES).bfloat16()
    np.testing.assert_array_equal(to_bf16(VALUES).view(np.int16), bf16.view(torch.int16).numpy())
    np.testing.assert_array_equal(from_bf16(to_bf16(VALUES)), bf16.float().numpy())
    assert to_fp8(np.array([np.nan, -np.nan, 1e9, -1e9], np.float32)).tolist() == [
        0x7F,
        0xFF,
        0x7E,
        0xFE,
    ]


def expand(scale_fd: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    return scale_fd.repeat(128, 0).repeat(128, 1)[: shape[0], : shape[1]]


@pytest.mark.parametrize("shape", [(128, 128), (576, 320), (1, 129)])
def test_dequantize(shape: tuple[int, int]) -> None:
    w_FD = RNG.integers(0, 127, shape, np.uint8)
    scale_fd = RNG.random((-(-shape[0] // 128), -(-shape[1] // 128)), np.float32)
    w = torch.from_numpy(w_FD).view(torch.float8_e4m3fn).float()
    want = (w * torch.from_numpy(expand(scale_fd, shape))).bfloat16().view(torch.int16)
    np.testing.assert_array_equal(dequantize(w_FD, scale_fd).view(np.int16), want.numpy())


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
@pytest.mark.parametrize("shape", [(128, 128), (576, 320), (1, 129)])
def test_quantize(shape: tuple[int, int], scale_fmt: str | None) -> None:
    x_FD = RNG.standard_normal(shape, np.float32)
    x_FD[:128, :128] *= 1e-6
    w_FD, scale_fd = quantize(x_FD, scale_fmt)
    assert scale_fd.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    if scale_fmt == "ue8m0":
        assert (np.frexp(scale_fd)[0] == 0.5).all()
    scale = expand(scale_fd, shape)
    error = np.abs(fp8_values()[w_FD] * scale - x_FD)
    assert (error <= np.maximum(np.abs(x_FD) / 16, scale * 2**-10) * 1.0001).all()


def test_quantize_zeros() -> None:
    w_FD, scale_fd = quantize(np.zeros((128, 128), np.float32))
    assert not w_FD.any()
    assert scale_fd.tolist() == [[1.0]]
