"""Lists the variants of kernels that steps of many sizes would have Triton compile.

TRITON_INTERPRET=0 PYTHONPATH=.:launch python tests/kernels/variants.py

Triton compiles a kernel anew where a number becomes 1, or it or an address ceases to be a multiple
of 16. For those that change while a model serves this would be a pause of seconds. Prints a line
for each kernel and each choice of its constants that comes in more than one variant, then the
number of such choices.
"""

import sys
from collections import defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchlib.rank_share import Rank, RankShape
from dsv3.config_files import DEMO, load_model_config
from dsv3.engine.runner import Runner
from dsv3.engine.step_plan import StepPlan
from dsv3.settings import CacheDtype
from dsv3_kernels import weight_dequant
from tests.kernels.compile_only import NoDevice, pretend

Found = dict[tuple[Any, ...], set[tuple[str, ...]]]
DECODE = [1, 2, 3, 8, 17]
PREFILL = [
    ([2], [0]),
    ([5], [70]),
    ([300], [0]),
    ([77], [70]),
    ([333], [130]),
    ([1, 3, 50], [1100, 7, 9]),
]


def plan_of(query_len: list[int], context_len: list[int], draws: bool = False) -> StepPlan:
    new, context = np.array(query_len, np.int32), np.array(context_len, np.int32)
    plan = StepPlan.greedy(new, context, np.ones((len(new), 1), np.int32))
    plan.token_ids, plan.query_len = np.ones(new.sum(), np.int32), new
    plan.page_count = -(-(context + new) // 64)
    plan.pages, plan.row = np.ones(plan.page_count.sum(), np.int32), new.cumsum(dtype=np.int32) - 1
    if draws:
        plan.temperature = plan.temperature + 1
    return plan


def serve(weights: str, cache: CacheDtype, world: int) -> None:
    """Run steps of many sizes through the runner of the last rank."""
    config = replace(load_model_config(DEMO), num_attention_heads=4 * world)
    shape = RankShape(
        config=config, world=world, rank=world - 1, layers=2, weights=weights, cache=cache
    )
    rank = Rank(shape, torch.device("cpu"), 2048)
    plans = [plan_of([1] * n, [7] * n, draws) for n in DECODE for draws in (False, True)]
    for is_static in (True, False):
        runner = Runner(rank.model, rank.cache, 4, static=is_static)
        for plan in (*plans, *(plan_of(*sizes) for sizes in PREFILL)):
            runner.run([plan])


def main() -> None:
    driver.set_active(NoDevice(90))
    pretend(90, use_triton=lambda x: True)
    found: Found = defaultdict(set)

    def record(self: JITFunction, *about: Any) -> None:
        _, signature, _, constants, options, attributes, _ = about
        chosen, variant = [self.__name__, options.num_warps, options.num_stages], []
        for i, param in enumerate(self.params):
            kind = signature[param.name]
            if param.is_constexpr:
                chosen.append(str(constants[i,]))
            else:
                chosen.append(kind if kind.startswith("*") else "")
                variant.append(f"{param.name} {kind} {attributes.get((i,), '')}")
        found[tuple(chosen)].add(tuple(variant))

    JITFunction._do_compile = record
    total = 0
    cases: list[tuple[CacheDtype, int]] = [("fp8", 1), ("bf16", 2)]
    for dtype, world in cases:
        found.clear()
        serve(dtype, dtype, world)
        for rows in (1, 3, 16):
            w, scale = torch.zeros(rows, 256).to(torch.float8_e4m3fn), torch.ones(rows, 2)
            weight_dequant(w, scale, torch.bfloat16, block=(1, 128))
        for chosen, variants in found.items():
            sets = [frozenset(variant) for variant in variants]
            common = sets[0].intersection(*sets)
            differ = sorted(sets[0].union(*sets) - common)
            if differ:
                sys.stdout.write(f"{chosen[0]}: {', '.join(differ)}\n")
        total += len(found)
    sys.stdout.write(f"{total}\n")


if __name__ == "__main__":
    main()
