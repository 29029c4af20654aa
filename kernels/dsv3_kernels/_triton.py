"""Triton where its kernels can run; elsewhere a stand-in that lets kernel files import.

It is left alone on a machine without a GPU unless its interpreter or compiler is asked for: it
takes a second to import, and some versions complain of leaks when the program ends.

A kernel file says `from dsv3_kernels._triton import tl, triton, use_triton`.
"""

import os
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor


class _Absent:
    """Answers to any name and any decorator; a decorated function stays the plain function."""

    def __getattr__(self, name: str) -> "_Absent":
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args and callable(args[0]) else self


# There are no wheels for some machines: references serve there.
HAS_TRITON = find_spec("triton") is not None and (
    torch.cuda.is_available() or "TRITON_INTERPRET" in os.environ
)
triton: Any = import_module("triton") if HAS_TRITON else _Absent()
tl: Any = import_module("triton.language") if HAS_TRITON else _Absent()


# Forms of kernels that no GPU has confirmed yet, so only who asks for them gets them:
# overlap: a kernel's launch begins while the kernel before still runs (programmatic dependent
#   launch, Hopper and later);
# gluon: decode attention of many heads by the kernel in `mla_decode_hopper` (Hopper).
UNPROVEN = ("overlap", "gluon")
_tried: set[str] = set()
_OVERLAPS = tl.constexpr(False)


def try_kernels(forms: Iterable[str], device: torch.device) -> None:
    """Switch on some of `UNPROVEN` for this process; to be called before any kernel is launched.

    Raises:
        ValueError: there is no such form, or the device cannot run it.
    """
    global _OVERLAPS  # a constant when kernels are compiled
    forms = set(forms)
    if unknown := forms - set(UNPROVEN):
        raise ValueError(f"{sorted(unknown)} are no forms of kernels; there are {UNPROVEN}")
    on_gpu = device.type == "cuda"
    if forms and not (on_gpu and torch.cuda.get_device_capability(device) >= (9, 0)):
        names = " and ".join(sorted(forms))
        raise ValueError(f"{names}: only for GPUs of compute capability 9.0 or more")
    _tried.update(forms)
    _OVERLAPS = tl.constexpr("overlap" in _tried)


def is_tried(form: str) -> bool:
    """Tell whether `try_kernels` has switched on one of `UNPROVEN`."""
    return form in _tried


@triton.jit
def in_turn():
    """Wait until the kernels before are through, then let the next one's launch begin.

    Every kernel begins with it. So whoever reads what another kernel wrote has waited for it, and
    that one for those before: overlapping launches change no order that memory sees.
    """
    if _OVERLAPS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def launch_options() -> dict[str, bool]:
    """Return what every launch is told beside its arguments."""
    return {"launch_pdl": True} if is_tried("overlap") else {}


def _mend_interpreter() -> None:
    """Let the interpreter of Triton before 3.7 take numbers out of arrays as NumPy 2.4 allows."""
    interpreter: Any = import_module("triton.runtime.interpreter")
    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_mend


if HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1":
    _mend_interpreter()


def use_triton(x: Tensor) -> bool:
    """Return whether `x` lives where Triton's kernels run."""
    return HAS_TRITON and x.is_cuda


def is_interpreted(x: Tensor) -> bool:
    """Tell whether launches on `x` are interpreted: bits of bfloat16 are multiplied as integers."""
    return not x.is_cuda


def has_tma(x: Tensor) -> bool:
    """Tell whether tiles can come through descriptors where `x` lives: Hopper and later."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)


def multiprocessors(x: Tensor) -> tuple[int, int]:
    """Return how many there are where `x` lives, and the bytes of shared memory of each."""
    if not x.is_cuda:
        return 3, 228 << 10
    gpu = torch.cuda.get_device_properties(x.device)
    return gpu.multi_processor_count, gpu.shared_memory_per_multiprocessor


def is_hopper(x: Tensor) -> bool:
    """Return whether `x` is on a GPU of compute capability 9."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9
