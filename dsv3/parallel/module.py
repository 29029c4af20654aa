"""The base class of the model's modules."""

from typing import Any

from torch import nn


class Module(nn.Module):
    """`nn.Module` with less work at a call, which takes a CPU part of a step of one token.

    Submodules and parameters are ordinary attributes, too: torch finds them in dictionaries of its
    own after Python's look-up has failed. A call without hooks is a call of `forward`.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call `forward`, and the hooks if there are any."""
        if self._forward_hooks or self._forward_pre_hooks:
            return super().__call__(*args, **kwargs)
        return self.forward(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Module | nn.Parameter):
            self.__dict__[name] = value
