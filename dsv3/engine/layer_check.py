"""Finds the first layer whose output is not finite. Costs a pass over every layer's output."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dsv3.model.transformer import Transformer


class LayerCheck:
    """Checks the output of every layer in steps that run eagerly.

    Attributes:
        bad_layer: the first layer of the last step whose output was not finite; None if all were.
    """

    def __init__(self, model: Transformer) -> None:
        self.bad_layer: int | None = None
        self._is_finite: list[Tensor] | None = None
        for layer in model.layers:
            layer.register_forward_hook(self._check)

    def run(self, step: Callable[[], Tensor]) -> Tensor:
        """Run a step of the model; wait for it and set `bad_layer`."""
        self._is_finite = []
        hidden_TD = step()
        flags = torch.stack(self._is_finite).tolist() if self._is_finite else []
        self.bad_layer = flags.index(False) if False in flags else None
        self._is_finite = None
        return hidden_TD

    def _check(self, _: nn.Module, __: object, output: tuple[Tensor, Tensor]) -> None:
        if self._is_finite is not None:
            self._is_finite.append(torch.stack([x.isfinite().all() for x in output]).all())
