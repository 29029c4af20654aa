"""Compiles, for a GPU that need not be there, what the wrappers would launch on it.

TRITON_INTERPRET=0 python tests/kernels/compile_only.py 90

The interpreter runs kernels as Python: it forgives branches of different types, and never makes a
constant of an integer argument that is 1. The compiler does not. Prints a line for each kernel.
"""

import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import dsv3_kernels  # noqa: F401 - all of its modules are looked through below
from dsv3_kernels.act_quant import Quantized, act_quant_triton
from dsv3_kernels.fp8_gemm import OLD_TILES, TILES, _launch_large, fp8_gemm_triton, make_locks
from dsv3_kernels.rmsnorm import add_rmsnorm_triton
from dsv3_kernels.silu_mul import silu_mul_quant_triton
from dsv3_kernels.weight_dequant import weight_dequant_triton


def launches(capability: int) -> None:
    """Call every wrapper with tensors whose shapes matter and whose values do not."""
    x = torch.zeros(129, 512, dtype=torch.bfloat16)
    q = act_quant_triton(x)
    add_rmsnorm_triton(x[:1], x[:1].float(), torch.ones(512), 1e-6, quant=True)
    silu_mul_quant_triton(x[:1], ue8m0=True)
    w, scale = torch.zeros(576, 512).to(torch.float8_e4m3fn), torch.ones(5, 4)
    weight_dequant_triton(w[:100, :100], scale[:1, :1], torch.bfloat16)
    fp8_gemm_triton(Quantized(q.q[:1], q.scale[:1]), w, scale, locks=make_locks(w))
    y, one = torch.zeros(129, 576, dtype=torch.bfloat16), Quantized(q.q[:16], q.scale[:16])
    fp8_gemm_triton(one, w, scale)
    is_hopper = capability >= 90
    tile = TILES[0] if is_hopper else OLD_TILES[-1]
    _launch_large(q, w, scale, y, tile, tma=is_hopper)


class NoDevice:
    """What triton asks of a driver to compile."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main() -> None:
    capability = int(sys.argv[1])
    driver.set_active(NoDevice(capability))
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        sys.stdout.write(f"{self.__name__} {kernel.metadata.shared}\n")

    JITFunction.run = compile_only
    for name, module in list(sys.modules.items()):
        if name.startswith("dsv3_kernels.") and hasattr(module, "is_native"):
            module.is_native = lambda x: capability >= 89
    launches(capability)


if __name__ == "__main__":
    main()
