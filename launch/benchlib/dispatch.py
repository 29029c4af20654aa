"""A MoE layer over several ranks: time and bytes on the wire, by form and number of tokens."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from benchlib.report import Report, Row
from dsv3.config import ModelConfig
from dsv3.distributed.mesh import Mesh
from dsv3.model.moe import MoE
from dsv3.model.side_stream import SideStream
from dsv3.parallel.expert_dispatch import ExpertDispatch
from dsv3.parallel.token_rows import FP8, DispatchSettings
from dsv3.parallel.weights import WeightFormat

Forms = dict[str, tuple[ExpertDispatch, bool]]
# What a form is called, its settings, and whether shapes are static.
_FORMS = (
    ("allreduce", DispatchSettings("allreduce"), False),
    ("alltoall", DispatchSettings("alltoall"), False),
    ("allreduce fp8", DispatchSettings("allreduce", FP8), False),
    ("alltoall fp8", DispatchSettings("alltoall", FP8), False),
    ("alltoall fp8 fixed", DispatchSettings("alltoall", FP8), True),
)
# What bytes are sent for, and how they are counted.
_PURPOSES = {"out": ("dispatch", "all_gather"), "back": ("combine",), "sum": ("all_reduce",)}


@torch.inference_mode()
def dispatch_time(
    mesh: Mesh, config: ModelConfig, dtype: torch.dtype, tokens: Sequence[int], repeats: int
) -> Report:
    """Time a layer of random weights in all forms, the sum over tp included. A collective.

    Args:
        mesh: the ranks.
        config: sizes of the layer and its routing rule.
        dtype: of weights and activations.
        tokens: numbers of tokens of every dp group.
        repeats: their median counts, on the slowest rank.
    """
    forms: Forms = {}
    groups = config.n_group, config.topk_group
    for name, settings, fixed in _FORMS:
        dispatch = ExpertDispatch(mesh, config.n_routed_experts, replace(settings, groups=groups))
        if settings.dtype is None or config.hidden_size % 128 == 0:
            forms[name] = dispatch, fixed
        if mesh.layout.dp == 1:
            break  # all ranks have all tokens: there is only one form
    side, fmt = SideStream(mesh.device), WeightFormat(dtype, mesh.device)
    moe = MoE(config, "", mesh.layout, fmt, dispatch, side)
    for module, seed in ((moe, 1 + mesh.layout.rank), (moe.router, 0)):
        generator = torch.Generator(mesh.device).manual_seed(seed)
        for weight in module.parameters():
            # A rank may hold no columns of a matrix whose blocks are not cut.
            weight.normal_(std=max(1, weight.shape[-1]) ** -0.5, generator=generator)
    report = Report("dispatch", x_label="tokens of a dp group", y_label="ms a layer")
    generator = torch.Generator(mesh.device).manual_seed(mesh.layout.dp_rank)
    for count in tokens:
        x_TD = torch.randn(count, config.hidden_size, device=mesh.device, generator=generator)
        for name, figures in _measure(moe, mesh, forms, x_TD.to(dtype), repeats).items():
            report.rows.append({"form": name, "tokens": count} | figures)
    for name in forms:
        report.series[name] = (tokens, [row["ms"] for row in report.rows if row["form"] == name])
    report.setting = {"tp": mesh.layout.tp, "dp": mesh.layout.dp, "dtype": str(dtype)}
    report.notes.append("B/token: sent to other ranks, by all ranks together, for every token")
    return report


def _measure(moe: MoE, mesh: Mesh, forms: Forms, x_TD: Tensor, repeats: int) -> dict[str, Row]:
    """Return milliseconds of a layer and bytes of a token, by form; all forms take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    sent: dict[str, Counter[str]] = {}
    for _ in range(1 + repeats):  # the first round warms up
        for name, (dispatch, fixed) in forms.items():
            moe.dispatch = dispatch
            dispatch.begin_step([len(x_TD)] * mesh.layout.dp, fixed)
            mesh.world.all_gather(torch.zeros(1, device=mesh.device)).sum().item()  # start together
            before, begin = _sent(mesh), time.perf_counter()
            mesh.tp.all_reduce(moe(x_TD)).sum().item()
            seconds[name].append(time.perf_counter() - begin)
            sent[name] = _sent(mesh) - before
    found: dict[str, Row] = {}
    for name in forms:
        mine = [sum(sent[name][each] for each in counted) for counted in _PURPOSES.values()]
        figures = [np.median(seconds[name][1:]), *mine, sent[name].total()]
        every = mesh.world.all_gather(torch.tensor(np.array(figures), device=mesh.device))
        found[name] = {"ms": 1e3 * float(every[:, 0].max())}
        per_token = every[:, 1:].sum(0) / (len(x_TD) * mesh.layout.dp)
        for purpose, num_bytes in zip([*_PURPOSES, "all"], per_token.tolist(), strict=True):
            found[name][f"{purpose} B/token"] = round(num_bytes)
    return found


def _sent(mesh: Mesh) -> Counter[str]:
    return sum((group.sent for group in mesh.groups), Counter())
