"""The base class of the model's modules."""

from typing import Any

from torch import nn


class Module(nn.Module):
    """`nn.Module` whose submodules and parameters are ordinary attributes, too.

    torch finds them in dictionaries of its own after Python's look-up has failed, which takes a
    CPU a thirtieth of a step of one token.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Module | nn.Parameter):
            self.__dict__[name] = value
