"""Compiles the kernels of the experts for GPUs that need not be there, and prints what came out.

python -m tests.kernels.compiled     (TRITON_INTERPRET unset)
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dsv3_kernels.grouped_gemm import _down_kernel, _gate_up_kernel, _tile
from dsv3_kernels.permute import _permute_kernel, _unpermute_kernel
from dsv3_kernels.route import _route_kernel
from dsv3_kernels.router_logits import _router_logits_kernel

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
FP8, BYTES, BF16, F32 = "fp8e4nv", "u8", "bf16", "fp32"


def compile_for(
    capability: int,
    kernel: Any,
    arguments: dict[str, str],
    constants: dict[str, Any],
    **options: int,
) -> dict[str, int]:
    """Return registers and bytes of stack a thread, shared memory, and matrix instructions."""
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else arguments[n] for n in names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [str(_TOOLS / "cuobjdump"), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    ptx = made.asm["ptx"]
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "shared": made.metadata.shared,
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": ptx.count("mma.sync.aligned"),
        "tma": ptx.count("cp.async.bulk.tensor"),
    }


def grouped(
    capability: int, kind: int, gated: bool, rows: int, x: str, w: str, tma: bool = False
) -> dict[str, int]:
    """Compile a product of V3's experts with the tile that `rows` rows an expert would get."""
    itemsize = {F32: 4, BF16: 2}.get(x, 1)
    tile = _tile(kind, itemsize, gated, rows)
    depth = 128 // itemsize
    fused = gated and kind in (2, 4) and tile.features == 128
    matrix = f"tensordesc<{w}[{tile.features}, {depth}]>" if tma else f"*{w}"
    arguments = {
        **dict.fromkeys(("x", "h"), f"*{x}"),
        **dict.fromkeys(("x_scale", "h_scale", "w_scale", "weights"), "*fp32"),
        **dict.fromkeys(("entries", "starts", "counts"), "*i32"),
        "w": matrix,
        "y": "*bf16",
        "E": "i32",
    }
    if gated:
        arguments["h"] = f"*{x}" if fused or kind not in (2, 4) else "*fp32"
    constants = {"F": 2048, "D": 7168, "TOP_K": 8, "WEIGHTED": True, "QUANT": fused, "E_PAD": 32}
    constants |= {"KIND": kind, "TMA": tma, "UE8M0": False, "INTERPRETED": False}
    constants |= {"BLOCK_M": tile.rows, "BLOCK_N": tile.features, "BLOCK_K": depth}
    kernel = _gate_up_kernel if gated else _down_kernel
    constants = {n: v for n, v in constants.items() if n in kernel.arg_names}
    stages = tile.stages if capability >= 90 else 2
    return compile_for(
        capability, kernel, arguments, constants, num_warps=tile.warps, num_stages=stages
    )


def small() -> dict[str, dict[str, int]]:
    """Compile what goes before and after the products."""
    ids = {"ids": "*i64", "entries": "*i32", "slots": "*i32", "starts": "*i32", "counts": "*i32"}
    sizes = dict.fromkeys(("first_expert", "E", "num_entries", "D"), "i32")
    v3 = {"E": 256, "G": 8, "TOPK_GROUP": 4, "K": 8, "G_PAD": 8, "M_PAD": 32, "K_PAD": 8}
    v3 |= {"S": 16, "SOFTMAX": False, "BIASED": True, "BEST_TWO": True, "NORMALIZE": True}
    rows = dict.fromkeys(("logits", "bias", "weights"), "*fp32") | {"scaling": "fp32", "T": "i32"}
    back = {"y_rows": "*bf16", "slots": "*i32", "weights": "*fp32", "y": "*fp32"}
    return {
        "route": compile_for(90, _route_kernel, ids | rows, v3, num_warps=1),
        "permute": compile_for(90, _permute_kernel, ids | sizes, {"BLOCK": 4096}),
        "unpermute": compile_for(
            90,
            _unpermute_kernel,
            back | sizes,
            {"K": 8, "WEIGHTED": False, "BLOCK": 1024},
        ),
    }


def router(x: str, apart: bool) -> dict[str, int]:
    """Compile the router's product for few tokens, and for many."""
    arguments = {"x": f"*{x}", "w": "*fp32", "logits": "*fp32", "T": "i32"}
    sizes = {"E": 256, "D": 7168, "PARTS": 16, "APART": apart, "INTERPRETED": False}
    sizes |= {"BLOCK_T": 16 if apart else 64, "BLOCK_E": 64, "BLOCK_D": 64 if x == BF16 else 32}
    kernel = _router_logits_kernel
    return compile_for(90, kernel, arguments, sizes, num_warps=4, num_stages=4)


def products() -> dict[str, dict[str, int]]:
    """Compile both products for few and many rows, in every kind of numbers."""
    return {
        "bf16 router 1": router(BF16, True),
        "bf16 router 300": router(BF16, False),
        "fp32 router 1": router(F32, True),
        "fp8 gate_up 1": grouped(90, 2, True, 1, FP8, FP8),
        "fp8 gate_up 64": grouped(90, 2, True, 64, FP8, FP8, tma=True),
        "fp8 gate_up 256": grouped(90, 2, True, 256, FP8, FP8),
        "fp8 down 1": grouped(90, 2, False, 1, FP8, FP8),
        "fp8 down 256": grouped(90, 2, False, 256, FP8, FP8, tma=True),
        "bf16 gate_up 1": grouped(90, 0, True, 1, BF16, BF16),
        "bf16 gate_up 256": grouped(90, 0, True, 256, BF16, BF16, tma=True),
        "bf16 x, fp8 gate_up 256": grouped(90, 1, True, 256, BF16, FP8, tma=True),
        "fp32 gate_up 16": grouped(90, 0, True, 16, F32, F32),
        "fp32 down 256": grouped(90, 0, False, 256, F32, F32),
        "sm_80 fp8 gate_up 256": grouped(80, 4, True, 256, BYTES, BYTES),
        "sm_80 bf16 x, fp8 down 256": grouped(80, 3, False, 256, BF16, BYTES),
        "sm_89 fp8 down 256": grouped(89, 2, False, 256, FP8, FP8),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(small() | products(), indent=1))
