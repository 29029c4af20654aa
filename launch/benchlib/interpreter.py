"""Fix of Triton's interpreter, which runs kernels on a CPU in tests and `bench.py kernels`."""

from importlib import import_module
from typing import Any

from dsv3_kernels._triton import HAS_TRITON


def patch_interpreter() -> None:
    """Fix how Triton before 3.7 converts arrays to integers under NumPy 2.4."""
    if not HAS_TRITON:
        return
    interpreter: Any = import_module("triton.runtime.interpreter")
    original = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor
