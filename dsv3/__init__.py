"""dsv3: a distributed runtime for DeepSeek-V3-family models in plain PyTorch.

Tensor names have shape letters as suffixes (`q_THN` is [T, H, N]; the letter is the same for
sharded and unsharded dimensions):

    B sequences             T tokens of the step (packed)   S cached positions
    D hidden                H heads                         A q_lora_rank
    C kv_lora_rank          N qk_nope_head_dim              R qk_rope_head_dim
    V v_head_dim            E experts                       K top k: experts or positions
    F expert hidden         M dispatched rows               G pages
    P positions in a page   W vocabulary                    I index_head_dim
    Q queries per sequence  L packed prompt chunks
    X two of these joined: C + R of a cache entry, N + R of a query
    Y a row of any other width

Where a letter means something else, the docstring says so: partial outputs and partial sums are
counted by N, S or, one of each rank, by P; a matrix product has M rows, N columns and sums over K.

A lower-case letter counts the 128-wide quantization blocks of that dimension: `w_FD` has
`scale_fd`. But `r` counts the pairs of a rotation (R / 2), and `g` groups of columns or experts.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dsv3.version import __version__

if TYPE_CHECKING:
    from dsv3.llm import LLM
    from dsv3.request import SamplingParams

__all__ = ["LLM", "SamplingParams", "__version__"]

_MODULES = {"LLM": "dsv3.llm", "SamplingParams": "dsv3.request"}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, since most of dsv3 works without torch."""
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
