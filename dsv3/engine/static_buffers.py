"""Inputs of short steps in memory that never moves, as CUDA graphs need them."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsv3.cache.layout import NULL_PAGE
from dsv3.engine.drafts import DraftRows
from dsv3.engine.sampler import Choice
from dsv3.engine.step_plan import NO_TARGET

# Arrays of a step, with a value for each new token, for each result (its row of the batch, the
# position that it predicts, how it is sampled), or for each drafted sequence (see `DraftRows`).
_OF_TOKENS = ("token", "position", "slot", "next")
_FLOATS = ("temperature", "top_p", "min_p")
_OF_RESULTS = ("row", "predicted", "seed", "answer", "top_k", *_FLOATS)
_OF_DRAFTED = ("draft_row", "draft_result", "draft_checked")
_ARRAYS = (*_OF_TOKENS, *_OF_RESULTS, *_OF_DRAFTED)
_PADDED_BY_MINUS_1 = ("position", "slot", "draft_checked")


class StaticBuffers:
    """Input buffers: `_ARRAYS` (int64, or float64 as its bits) and page tables.

    The host has two copies of each: it writes one while the other may still be in transfer.

    Args:
        rows: length of every array, and number of page tables.
        pages: width of the page tables.
        device: device of the buffers.
    """

    def __init__(self, rows: int, pages: int, device: torch.device) -> None:
        shapes = (len(_ARRAYS), rows), (rows, pages)
        kinds = tuple(zip(shapes, (torch.int64, torch.int32), strict=True))
        on_gpu = device.type == "cuda"
        self._hosts = [
            [torch.zeros(shape, dtype=dtype, pin_memory=on_gpu) for shape, dtype in kinds]
            for _ in range(2)
        ]
        self._sent = [torch.cuda.Event() for _ in range(2)] if on_gpu else []
        self._device = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in kinds]
        self._turn = 0

    @property
    def page_TG(self) -> Tensor:
        """Page tables, [rows, pages] int32."""
        return self._device[1]

    def row(self, name: str) -> Tensor:
        """Return an array, [rows] int64 or float32."""
        values = self._device[0][_ARRAYS.index(name)]
        return values.view(torch.float64).float() if name in _FLOATS else values

    def fill(self, page_TG: NDArray[np.int32], **arrays: NDArray[Any]) -> None:
        """Write a step's page tables and arrays, and send them; does not wait for the device.

        Rows that pad the step see no key, choose no expert and write nothing.
        """
        self._turn ^= 1
        if self._sent:
            self._sent[self._turn].synchronize()
        rows, table = (host.numpy() for host in self._hosts[self._turn])
        count, width = page_TG.shape
        table[:count, :width] = page_TG
        table[:count, width:] = NULL_PAGE
        table[count:] = NULL_PAGE
        for name, row in zip(_ARRAYS, rows, strict=True):
            values = arrays[name]
            target = row.view(np.float64) if name in _FLOATS else row
            target[: len(values)] = values
            target[len(values) :] = -1 if name in _PADDED_BY_MINUS_1 else 0
        for device, host in zip(self._device, self._hosts[self._turn], strict=True):
            device.copy_(host, non_blocking=True)
        if self._sent:
            self._sent[self._turn].record()

    def choice(self) -> Choice:
        """Return how each result is sampled."""
        return Choice(
            temperature=self.row("temperature"),
            top_k=self.row("top_k"),
            top_p=self.row("top_p"),
            min_p=self.row("min_p"),
            seed=self.row("seed"),
            answer=self.row("answer"),
            position=self.row("predicted"),
            target=torch.full_like(self.row("position"), NO_TARGET),
        )

    def draft_rows(self, choice: Choice | None) -> DraftRows:
        """Return the rows that drafts continue; `choice` is that of all results, if any draws."""
        row_N = self.row("draft_row")
        result_N = self.row("draft_result")
        return DraftRows(
            next_T=self.row("next"),
            row_N=row_N,
            result_N=result_N,
            checked_N=self.row("draft_checked"),
            page_NG=self.page_TG[row_N],
            choice=None if choice is None else Choice(*(array[result_N] for array in choice)),
        )
