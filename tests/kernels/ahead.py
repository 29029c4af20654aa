"""Compiles some kernels ahead twice, then launches them on a pretended GPU.

TRITON_INTERPRET=0 PYTHONPATH=. python tests/kernels/ahead.py

Prints a line of JSON: the replies of the first and of the second time, the reply to a variant that
no kernel has, and for every launch if it found its kernel in the cache.
"""

import json
import sys
from dataclasses import replace
from unittest import mock

import torch
from triton import knobs
from triton.runtime import driver

from dsv3_kernels import act_quant, add_rmsnorm, fp8_gemm
from dsv3_kernels._gpu import Gpu
from dsv3_kernels.gemm.fp8_gemm import TILES, launch_large
from dsv3_kernels.variants import Variant, compile_variants, record_variants
from tests.kernels.compile_only import NoDevice
from tests.kernels.dry_cuda import dry_gpu
from tests.kernels.dry_gpu import CUDA

GPU = Gpu((9, 0), multiprocessors=132, shared_bytes=228 << 10)


def launches(device: torch.device) -> None:
    """Launch kernels with constants, numbers that are 1, FP8, and descriptors of tiles."""
    x = torch.empty(3, 256, dtype=torch.bfloat16, device=device)
    w = torch.empty(192, 256, dtype=torch.float8_e4m3fn, device=device)
    scale = torch.empty(2, 2, device=device)
    add_rmsnorm(x, None, torch.empty(256, device=device), 1e-6, quant=True)
    quantized = act_quant(x, ue8m0=True)
    y = fp8_gemm(quantized, w, scale)
    launch_large(quantized, w, scale, y, TILES[2], tma=True)


def replies(variants: list[Variant]) -> list[str]:
    """Return the replies to variants that are compiled by two processes."""
    found: list[str] = []
    compile_variants(variants, GPU, False, 2, lambda _, reply: found.append(reply))
    return sorted(found)


def main() -> None:
    driver.set_active(NoDevice(90))
    with record_variants(GPU) as found:
        launches(torch.device("meta"))
    variants = list(found)
    damaged = [Variant("dsv3_kernels", "none", "{}"), replace(variants[0], specialization="{}")]
    times = [replies(variants), replies(variants), replies(damaged)]
    hits: list[bool] = []

    def listen(*, cache_hit: bool, **_: object) -> None:
        hits.append(cache_hit)

    with dry_gpu(), mock.patch.object(knobs.compilation, "listener", listen):
        launches(CUDA)
    sys.stdout.write(json.dumps([*times, hits]) + "\n")


if __name__ == "__main__":
    main()
