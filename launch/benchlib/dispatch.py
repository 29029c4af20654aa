"""Time and exchanged bytes of a MoE layer over several ranks, by dispatch variant and tokens."""

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from benchlib.flags import at_least
from benchlib.report import Report, Row
from common import tune_process
from dsv3.config import ModelConfig
from dsv3.config_files import DEMO, load_model_config
from dsv3.distributed.mesh import Mesh, before_joining
from dsv3.model.moe import MoE
from dsv3.model.side_stream import SideStream
from dsv3.parallel.expert_dispatch import ExpertDispatch, StepTokens
from dsv3.parallel.token_rows import DispatchSettings
from dsv3.parallel.weight_format import WeightFormat
from dsv3_kernels.fp8_format import FP8
from program import join_ranks

# The dispatch of each variant, and whether its shapes are static.
Variants = dict[str, tuple[ExpertDispatch, bool]]
# Name of a variant, its settings, and whether its shapes are static.
_VARIANTS = (
    ("allreduce", DispatchSettings("allreduce"), False),
    ("alltoall", DispatchSettings("alltoall"), False),
    ("allreduce fp8", DispatchSettings("allreduce", FP8), False),
    ("alltoall fp8", DispatchSettings("alltoall", FP8), False),
    ("alltoall fp8 fixed", DispatchSettings("alltoall", FP8), True),
)
# Columns of sent bytes, and the counters that each one adds up.
_PURPOSES = {"out": ("dispatch", "all_gather"), "back": ("combine",), "sum": ("all_reduce",)}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    add = parser.add_argument
    text = "tokens of each dp group"
    add("--tokens", type=at_least(1), nargs="+", default=[1, 8, 64, 512], help=text)
    add("--config", help="model whose layer to build (default: the demo model)")
    add("--inner", type=at_least(1), help="width of an expert, to fit the memory")
    text = "of weights and activations"
    add("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help=text)
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--tp", type=int, default=0, help="tensor-parallel ranks (default: ranks / dp)")
    add("--dp", type=int, default=1, help="data-parallel groups")
    add("--repeats", type=at_least(1), default=9, help="timed runs of each variant")


def run(args: argparse.Namespace) -> Report | None:
    """Time one MoE layer on all ranks; rank 0 returns the report."""
    with before_joining():
        config = load_model_config(args.config or DEMO)
    if args.inner:
        config = replace(config, moe_intermediate_size=args.inner)
    with join_ranks(args.device, args.tp, args.dp) as mesh:
        tune_process(mesh)
        mesh.layout.check(config)
        report = dispatch_time(mesh, config, getattr(torch, args.dtype), args.tokens, args.repeats)
        report.setting |= {"config": args.config or "demo", "ranks": mesh.layout.world_size}
        return report if mesh.layout.rank == 0 else None


@torch.inference_mode()
def dispatch_time(
    mesh: Mesh, config: ModelConfig, dtype: torch.dtype, tokens: Sequence[int], repeats: int
) -> Report:
    """Time a layer with random weights in all variants, with the sum over tp. A collective.

    Args:
        mesh: the ranks.
        config: sizes of the layer and its routing rule.
        dtype: dtype of weights and activations.
        tokens: token counts to measure, each per dp group.
        repeats: timed runs; the report has their median on the slowest rank.
    """
    variants: Variants = {}
    groups = (config.n_group, config.topk_group)
    for name, settings, is_static in _VARIANTS:
        dispatch = ExpertDispatch(mesh, config.n_routed_experts, replace(settings, groups=groups))
        if settings.dtype is None or config.hidden_size % 128 == 0:
            variants[name] = (dispatch, is_static)
        if mesh.layout.dp == 1:
            break  # every rank has all tokens, so there is only one variant
    weight_format = WeightFormat(dtype, mesh.device)
    moe = MoE(config, "", mesh.layout, weight_format, dispatch, SideStream(mesh.device))
    for module, seed in ((moe, 1 + mesh.layout.rank), (moe.router, 0)):
        generator = torch.Generator(mesh.device).manual_seed(seed)
        for weight in module.parameters():
            # A rank may have no columns of a matrix that is split in whole blocks.
            weight.normal_(std=max(1, weight.shape[-1]) ** -0.5, generator=generator)
    report = Report("dispatch", x_label="tokens of a dp group", y_label="ms a layer")
    generator = torch.Generator(mesh.device).manual_seed(mesh.layout.dp_rank)
    for count in tokens:
        x_TD = torch.randn(count, config.hidden_size, device=mesh.device, generator=generator)
        for name, figures in _measure(moe, mesh, variants, x_TD.to(dtype), repeats).items():
            report.rows.append({"form": name, "tokens": count} | figures)
    for name in variants:
        report.series[name] = (tokens, [row["ms"] for row in report.rows if row["form"] == name])
    report.setting = {"tp": mesh.layout.tp, "dp": mesh.layout.dp, "dtype": str(dtype)}
    report.notes.append("B/token: bytes that all ranks together send to other ranks, per token")
    return report


def _measure(
    moe: MoE, mesh: Mesh, variants: Variants, x_TD: Tensor, repeats: int
) -> dict[str, Row]:
    """Return milliseconds of a layer and bytes per token of each variant; variants alternate."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    sent: dict[str, Counter[str]] = {}
    for _ in range(1 + repeats):  # the first round warms up
        for name, (dispatch, is_static) in variants.items():
            moe.dispatch = dispatch
            tokens = StepTokens([len(x_TD)] * mesh.layout.dp, is_static)
            mesh.world.all_gather(torch.zeros(1, device=mesh.device)).sum().item()  # start together
            sent_before = _sent(mesh)
            begin = time.perf_counter()
            mesh.tp.all_reduce(moe(x_TD, tokens=tokens)).sum().item()
            seconds[name].append(time.perf_counter() - begin)
            sent[name] = _sent(mesh) - sent_before
    rows: dict[str, Row] = {}
    for name in variants:
        own_bytes = [
            sum(sent[name][counter] for counter in counters) for counters in _PURPOSES.values()
        ]
        own_figures = np.array([np.median(seconds[name][1:]), *own_bytes, sent[name].total()])
        figures = mesh.world.all_gather(torch.tensor(own_figures, device=mesh.device))
        rows[name] = {"ms": 1e3 * float(figures[:, 0].max())}
        per_token = figures[:, 1:].sum(0) / (len(x_TD) * mesh.layout.dp)
        for purpose, num_bytes in zip([*_PURPOSES, "all"], per_token.tolist(), strict=True):
            rows[name][f"{purpose} B/token"] = round(num_bytes)
    return rows


def _sent(mesh: Mesh) -> Counter[str]:
    return sum((group.sent for group in mesh.groups), Counter())
