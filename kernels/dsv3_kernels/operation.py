"""Operations: a torch reference, which defines the result, and a faster Triton kernel.

    @operation(kernel=_launch_act_quant)
    def act_quant(x_TD: Tensor, ue8m0: bool = False) -> Quantized:
        ...  # the reference

A call runs the kernel if the first argument is on a GPU, else the reference. Tests and benchmarks
call `act_quant.reference` and `act_quant.kernel`. Both take the same parameters, so a parameter may
matter to only one of them; its docstring says so.
"""

from collections.abc import Callable
from functools import update_wrapper
from typing import Concatenate, Generic, ParamSpec, Protocol, TypeVar

import torch

from dsv3_kernels._gpu import gpu_of
from dsv3_kernels._triton import HAS_TRITON


class OnDevice(Protocol):
    """A tensor, or a group of tensors on one device."""

    @property
    def device(self) -> torch.device:
        """The device."""
        ...


First = TypeVar("First", bound=OnDevice)
P = ParamSpec("P")
R = TypeVar("R")


def use_triton(x: OnDevice) -> bool:
    """Return True if Triton kernels run on the device of `x`.

    The only place that decides: tests replace this function to run kernels in the interpreter.
    """
    return HAS_TRITON and gpu_of(x.device) is not None


class Operation(Generic[First, P, R]):
    """A function with two implementations; see the module's docstring.

    Attributes:
        reference: defines the result, in torch operations, on any device.
        kernel: launches Triton kernels.
    """

    def __init__(
        self,
        reference: Callable[Concatenate[First, P], R],
        kernel: Callable[Concatenate[First, P], R],
    ) -> None:
        self.reference = reference
        self.kernel = kernel
        update_wrapper(self, reference)

    def uses_triton(self, first: OnDevice) -> bool:
        """Return True if a call with this first argument runs the kernel."""
        return use_triton(first)

    def __call__(self, first: First, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the kernel if `first` is on a GPU, else the reference."""
        if use_triton(first):
            return self.kernel(first, *args, **kwargs)
        return self.reference(first, *args, **kwargs)


def operation(
    *, kernel: Callable[Concatenate[First, P], R]
) -> Callable[[Callable[Concatenate[First, P], R]], Operation[First, P, R]]:
    """Return a decorator that makes an operation of its reference."""

    def decorate(reference: Callable[Concatenate[First, P], R]) -> Operation[First, P, R]:
        return Operation(reference, kernel)

    return decorate
