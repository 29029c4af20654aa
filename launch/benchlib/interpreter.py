"""Triton's interpreter, which runs kernels on a CPU in tests and in `bench.py kernels --check`."""

from importlib import import_module
from typing import Any

from dsv3_kernels._triton import HAS_TRITON


def mend_interpreter() -> None:
    """Let the interpreter of Triton before 3.7 take numbers out of arrays as NumPy 2.4 allows."""
    if not HAS_TRITON:
        return
    interpreter: Any = import_module("triton.runtime.interpreter")
    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_mend
