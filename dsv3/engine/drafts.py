"""Drafts of the next tokens by the MTP layer, on the device, at the end of each step.

A step verifies the drafts of the step before: it samples a token at every drafted position, and
accepts the drafts before the first one that is not the token sampled there. Tokens are sampled with
random numbers that depend on seed and position only, so drafts do not change the answer.
Drafts are sampled with the same numbers, which makes them equal more often.

Then the MTP layer runs on all tokens of the step, so that its cache has an entry of every position,
and from there, token by token, on the drafts. The entries of drafts and of rejected tokens are
overwritten by the step that computes their positions, before any token attends to them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsv3.cache.layout import CacheLayout
from dsv3.cache.pool import CachePool
from dsv3.engine.sampler import Choice, Sampler
from dsv3.engine.step_plan import StepPlan
from dsv3.engine.transfer import all_to_device
from dsv3.model.absorb_rule import AbsorbRule
from dsv3.model.batch import Batch, DecodeGroup
from dsv3.model.transformer import Transformer
from dsv3.parallel.expert_dispatch import StepTokens
from dsv3.settings import MAX_DRAFTS
from dsv3_kernels import PageTables


@dataclass(frozen=True, slots=True)
class DraftRows:
    """The rows of a step that drafts continue; N sequences.

    The fields are those of `StepPlan`, on the device.

    Attributes:
        next_T: [T] int64 `next_ids`: the token after each token of the step.
        row_N: [N] int64 `draft_row`: row of each sequence's last token before the drafts.
        result_N: [N] int64 `draft_result`: the result of that row.
        checked_N: [N] int64 `draft_checked`: drafts to verify; -1 in rows that pad a graph's step.
        page_NG: [N, G] int32 pages of the sequences.
        choice: how each sequence samples; None if all are greedy.
    """

    next_T: Tensor
    row_N: Tensor
    result_N: Tensor
    checked_N: Tensor
    page_NG: Tensor
    choice: Choice | None

    @classmethod
    def of(cls, plan: StepPlan, page_NG: NDArray[np.int32], device: torch.device) -> "DraftRows":
        """Return the rows that a plan names; `page_NG` has the pages of its drafted sequences."""
        # Steps that are not an engine's, such as the first one, name no tokens.
        next_ids = plan.next_ids if len(plan.next_ids) else np.zeros_like(plan.token_ids)
        longs = (next_ids, plan.draft_row, plan.draft_result, plan.draft_checked)
        arrays: list[NDArray[Any]] = [page_NG, *(array.astype(np.int64) for array in longs)]
        index = plan.draft_result.astype(np.int64)
        is_drawn = bool((plan.temperature[index] > 0).any())
        if is_drawn:
            arrays += Choice.arrays(plan, index)
        page, next_T, row_N, result_N, checked_N, *choice = all_to_device(arrays, device)
        drawn = Choice.of(*choice) if is_drawn else None
        return cls(next_T, row_N, result_N, checked_N, page, drawn)


class Drafter:
    """Drafts tokens on one rank.

    Args:
        model: with an MTP layer.
        cache: with its pages.
        sampler: of the model.
        rule: of the keys that tokens attend to.
    """

    def __init__(
        self, model: Transformer, cache: CachePool, sampler: Sampler, rule: AbsorbRule
    ) -> None:
        self._model = model
        self._cache = cache
        self._sampler = sampler
        self._rule = rule

    def __call__(
        self,
        hidden_TD: Tensor,
        token_M: Tensor,
        batch: Batch,
        rows: DraftRows,
        num_drafts: int,
        per_group: Sequence[int],
    ) -> Tensor:
        """Return the next drafts of each sequence, [N, num_drafts] int64. A collective.

        Args:
            hidden_TD: the model's hidden states.
            token_M: the step's results.
            batch: the step.
            rows: the rows to continue.
            num_drafts: drafts of a sequence, at least one.
            per_group: drafted sequences of every dp group.
        """
        h_TD = self._model.draft(hidden_TD, _next_tokens(token_M, rows), batch, self._cache)
        if not any(per_group):  # the step has only parts of prompts
            return rows.row_N.new_zeros(0, num_drafts)
        # Drafts continue from the last accepted token, at position p: its row of the MTP layer has
        # read the token of p + 1, which was sampled, and predicts that of p + 2.
        row_N = rows.row_N + count_accepted(token_M, batch.token_T, rows)
        position_N = batch.position_T[row_N].masked_fill(rows.checked_N < 0, -1)
        h_ND = h_TD[row_N]
        kept = self._selection(batch, row_N)
        tokens = StepTokens(list(per_group), is_static=batch.tokens.is_static)
        drafts = [self._choose(h_ND, rows.choice, position_N + 2)]
        while len(drafts) < num_drafts:
            position_N = torch.where(position_N < 0, position_N, position_N + 1)
            one_each = self._batch(drafts[-1], position_N, rows.page_NG, tokens)
            if kept is not None:
                one_each.selected = [kept]
                one_each.keeps_selected = True
            h_ND = self._model.draft(h_ND, drafts[-1], one_each, self._cache)
            drafts.append(self._choose(h_ND, rows.choice, position_N + 2))
        return torch.stack(drafts, 1)

    def _choose(self, h_ND: Tensor, choice: Choice | None, position_N: Tensor) -> Tensor:
        """Return a draft of each sequence, [N] int64.

        Args:
            h_ND: hidden states of the MTP layer.
            choice: how each sequence samples; None if all are greedy.
            position_N: positions of the drafts, which choose the random numbers.
        """
        if not len(h_ND):
            return position_N
        logits_NW = self._model.logits(h_ND)
        if choice is None:
            return self._sampler.greedy(logits_NW).clamp_min(0)
        drawn = self._sampler.whole_rows(logits_NW, choice._replace(position=position_N), 1)
        return drawn[:, 0].long().clamp_min(0)

    def _selection(self, batch: Batch, row_N: Tensor) -> PageTables | None:
        """Return the keys that the MTP layer has selected for some rows of a step.

        None if further drafts select keys of their own: in most models, and after a step whose
        context was short enough for some rows to attend to all keys.
        """
        is_shared = self._model.config.index_share_for_mtp_iteration
        is_selected = not batch.chunks and all(g.is_sparse for g in batch.groups)
        if not (is_shared and is_selected and len(row_N)):
            return None
        tables = PageTables.stacked(batch.selected)
        return PageTables(tables.page_BG[row_N], tables.query_pos_BQ[row_N], tables.paging)

    def _batch(
        self, token_N: Tensor, position_N: Tensor, page_NG: Tensor, tokens: StepTokens
    ) -> Batch:
        """Return the batch that has one token of each sequence.

        Args:
            token_N: the drafts; the MTP layer is given their embeddings apart.
            position_N: positions of the entries to write; -1 writes none and sees no key.
            page_NG: pages of the sequences.
            tokens: numbers of tokens of all dp groups.
        """
        layout = self._cache.layout
        if tokens.is_static:
            tokens = replace(tokens, position_T=position_N)
        return Batch(
            token_T=token_N,
            position_T=position_N,
            own_slot=layout.paging.slots(page_NG, position_N),
            num_decode_rows=len(token_N),
            tokens=tokens,
            groups=[self._group(layout, position_N, page_NG)],
        )

    def _group(self, layout: CacheLayout, position_N: Tensor, page_NG: Tensor) -> DecodeGroup:
        query_pos_BQ = position_N[:, None]
        is_sparse = self._rule.selects(page_NG.shape[1] * layout.page_size)
        keys = None
        if position_N.device.type == "cpu" and len(position_N) and not is_sparse:
            longest = min(int(position_N.max()) + 1, page_NG.shape[1] * layout.page_size)
            keys = layout.paging.keys(page_NG, query_pos_BQ, longest)
        return DecodeGroup(0, len(position_N), page_NG, query_pos_BQ, is_sparse, keys)


def _next_tokens(token_M: Tensor, rows: DraftRows) -> Tensor:
    """Return the token after each token of a step, [T]: known ones, and sampled ones."""
    sampled_T = token_M[(-1 - rows.next_T).clamp_min(0)] if len(token_M) else rows.next_T
    next_T = torch.where(rows.next_T < 0, sampled_T, rows.next_T)
    return next_T.clamp_min(0)  # rows whose logits are not finite sample nothing


def count_accepted(token_M: Tensor, token_T: Tensor, rows: DraftRows) -> Tensor:
    """Return the number of drafts of each sequence before the first one that differs, [N] int64.

    Args:
        token_M: [M] the step's results; a draft is compared with the result of the row before it.
        token_T: [T] tokens of the step, drafts included.
        rows: the sequences.
    """
    most = max(len(token_T) - 1, 0)
    step = torch.arange(min(MAX_DRAFTS, most), device=token_T.device)
    drafted_NK = token_T[(rows.row_N[:, None] + 1 + step).clamp_max(most)]
    sampled_NK = token_M[(rows.result_N[:, None] + step).clamp_max(max(len(token_M) - 1, 0))]
    is_same_NK = (drafted_NK == sampled_NK) & (step < rows.checked_N[:, None])
    return is_same_NK.long().cumprod(1).sum(1)
