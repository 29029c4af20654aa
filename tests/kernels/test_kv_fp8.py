"""The packed FP8 cache entry: its bytes, its rounding, its use in decode attention."""

import struct

import pytest
import torch

from dsv3_kernels import PageTables, Paging, mla_decode, pack_latent, packed_bytes, unpack_latent


def test_published_size() -> None:
    assert packed_bytes(512, 64) == 656


@pytest.mark.parametrize(("value_dim", "rope_dim"), [(512, 64), (128, 16), (64, 16), (200, 10)])
def test_bytes_mean_what_the_format_says(value_dim: int, rope_dim: int) -> None:
    entry = torch.randn(3, value_dim + rope_dim) * torch.tensor([[1e-6], [1.0], [1e4]])
    packed = pack_latent(entry, value_dim)
    assert packed.shape == (3, packed_bytes(value_dim, rope_dim)) and packed.dtype == torch.uint8
    blocks = -(-value_dim // 128)
    for row, values in zip(packed, entry, strict=True):
        raw = bytes(row.tolist())
        scales = struct.unpack(f"<{blocks}f", raw[value_dim : value_dim + 4 * blocks])
        for b in range(blocks):
            block = values[128 * b : min(128 * b + 128, value_dim)]
            assert scales[b] == pytest.approx(max(float(block.abs().max()), 1e-4) / 448, rel=1e-6)
            stored = torch.tensor(list(raw[128 * b : 128 * b + len(block)]), dtype=torch.uint8)
            decoded = stored.view(torch.float8_e4m3fn).float() * scales[b]
            # e4m3 has three bits of mantissa; below 2^-6 of the scale's unit it is linear.
            allowed = (block.abs() / 16).clamp_min(scales[b] * 2.0**-10)
            assert bool(((decoded - block).abs() <= allowed * 1.001).all())
        keys = struct.unpack(f"<{rope_dim}H", raw[value_dim + 4 * blocks :])
        wanted = values[value_dim:].to(torch.bfloat16).view(torch.uint16).tolist()
        assert list(keys) == wanted


def test_unpacking_and_packing_again_changes_nothing() -> None:
    packed = pack_latent(torch.randn(40, 144) * 3, 128)
    once = unpack_latent(packed, 128, torch.float32)
    assert torch.equal(unpack_latent(pack_latent(once, 128), 128, torch.float32), once)


def test_zeros_stay_zeros() -> None:
    entry = torch.zeros(2, 144)
    assert torch.equal(unpack_latent(pack_latent(entry, 128), 128, torch.float32), entry)


def test_decode_reads_the_packed_form() -> None:
    entry, query = torch.randn(9, 144), torch.randn(2, 1, 4, 144)
    page, query_pos = torch.tensor([[3, 1], [2, 0]], dtype=torch.int32), torch.tensor([[2], [1]])
    packed = pack_latent(entry, 128)
    plain = unpack_latent(packed, 128, torch.float32)
    tables = PageTables(page, query_pos, Paging(2))
    got = mla_decode(query, packed, tables, 128, 0.1)
    want = mla_decode(query, plain, tables, 128, 0.1)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_no_entries() -> None:
    """A rank may hold none of a step's positions."""
    assert pack_latent(torch.zeros(0, 144), 128).shape == (0, 164)
