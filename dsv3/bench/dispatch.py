"""A MoE layer over several ranks: time and bytes on the wire, by form and number of tokens."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from dsv3.bench.report import Report
from dsv3.config import ModelConfig
from dsv3.model.moe import MoE
from dsv3.parallel.experts import FP8, DispatchSettings, ExpertDispatch
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.weights import WeightFormat

# What a form is called, its settings, and whether shapes are static.
_FORMS = (
    ("allreduce", DispatchSettings("allreduce"), False),
    ("allreduce fp8", DispatchSettings("allreduce", FP8), False),
    ("alltoall", DispatchSettings("alltoall"), False),
    ("alltoall fp8", DispatchSettings("alltoall", FP8), False),
    ("alltoall fp8 fixed", DispatchSettings("alltoall", FP8), True),
)


@torch.inference_mode()
def dispatch_time(
    mesh: Mesh, config: ModelConfig, dtype: torch.dtype, tokens: Sequence[int], repeats: int
) -> Report:
    """Time a layer of random weights in all forms, the sum over tp included. A collective.

    Bytes are those that all ranks together sent to others, for every token.

    Args:
        mesh: the ranks.
        config: sizes of the layer and its routing rule.
        dtype: of weights and activations.
        tokens: numbers of tokens of every dp group.
        repeats: their median counts, on the slowest rank.
    """
    fmt, num_experts = WeightFormat(dtype, mesh.device), config.n_routed_experts
    moe = MoE(config, "", mesh.layout, fmt, ExpertDispatch(mesh, num_experts))
    _fill(moe, 1 + mesh.layout.rank)
    _fill(moe.router, 0)
    forms, groups = {}, (config.n_group, config.topk_group)
    # Where all ranks have all tokens, there is only one form.
    for name, settings, fixed in _FORMS[: None if mesh.layout.dp > 1 else 1]:
        forms[name] = ExpertDispatch(mesh, num_experts, replace(settings, groups=groups)), fixed
    report = Report("dispatch", x_label="tokens of a dp group", y_label="ms a layer")
    for count in tokens:
        for name, (ms, sent) in _measure(moe, mesh, forms, count, repeats).items():
            report.rows.append({"form": name, "tokens": count, "ms": ms} | sent)
    for name in forms:
        report.series[name] = (tokens, [row["ms"] for row in report.rows if row["form"] == name])
    report.setting = {"tp": mesh.layout.tp, "dp": mesh.layout.dp, "dtype": str(dtype)}
    return report


def _fill(module: nn.Module, seed: int) -> None:
    generator = torch.Generator(next(module.parameters()).device).manual_seed(seed)
    for weight in module.parameters():
        weight.normal_(std=weight.shape[-1] ** -0.5, generator=generator)


def _measure(
    moe: MoE,
    mesh: Mesh,
    forms: dict[str, tuple[ExpertDispatch, bool]],
    count: int,
    repeats: int,
) -> dict[str, tuple[float, dict[str, int]]]:
    """Return milliseconds of a layer and bytes of a token, by form; all forms take turns."""
    device, hidden = mesh.device, moe.down_proj.weight.shape[1]
    generator = torch.Generator(device).manual_seed(mesh.layout.dp_rank)
    x_TD = torch.randn(count, hidden, device=device, generator=generator).to(moe.down_proj.dtype)
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    sent = {}
    for _ in range(1 + repeats):  # the first round warms up
        for name, (moe.dispatch, fixed) in forms.items():
            moe.dispatch.begin_step([count] * mesh.layout.dp, fixed)
            mesh.world.all_gather(torch.zeros(1, device=device)).sum().item()  # start together
            before, begin = _sent(mesh), time.perf_counter()
            mesh.tp.all_reduce(moe(x_TD)).sum().item()
            seconds[name].append(time.perf_counter() - begin)
            sent[name] = _sent(mesh) - before
    found = {}
    for name in forms:
        figures = [np.median(seconds[name][1:]), *_by_purpose(sent[name]).values()]
        every = mesh.world.all_gather(torch.tensor(figures, dtype=torch.float64, device=device))
        per_token = (every[:, 1:].sum(0) / (count * mesh.layout.dp)).round().int().tolist()
        names = _by_purpose(sent[name])
        found[name] = 1e3 * float(every[:, 0].max()), dict(zip(names, per_token, strict=True))
    return found


def _sent(mesh: Mesh) -> Counter[str]:
    return sum((group.sent for group in mesh.groups), Counter())


def _by_purpose(sent: Counter[str]) -> dict[str, int]:
    return {
        "dispatch, B/token": sent["dispatch"] + sent["all_gather"],
        "combine, B/token": sent["combine"],
        "sum over tp, B/token": sent["all_reduce"],
        "all, B/token": sent.total(),
    }
