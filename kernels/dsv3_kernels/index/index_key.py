"""Index keys from their projection: normalize, rotate, round, store. Bound by latency."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dsv3_kernels.attention.rope import Rotation, apply_rope
from dsv3_kernels.index.index_cache import IndexCache

# Of DeepSeek's and transformers' indexers, independent of the config's rms_norm_eps.
_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class IndexWrite:
    """The keys of new tokens, and the slots for them.

    Attributes:
        key_TI: [T, I] as projected; rows may be strided.
        weight_I, bias_I: [I] float32, of the LayerNorm.
        rotation: of the first dimensions of the keys, as many as it has.
        cache: written in place.
        slot_T: [T] int64, distinct except for -1, which stores nothing.
    """

    key_TI: Tensor
    weight_I: Tensor
    bias_I: Tensor
    rotation: Rotation
    cache: IndexCache
    slot_T: Tensor

    @property
    def device(self) -> torch.device:
        """Device of the keys."""
        return self.key_TI.device


def write_index_keys(write: IndexWrite) -> None:
    """Store LayerNorm(key), its first dimensions rotated, in the cache's format.

    Source: DeepSeek-V3.2 report, section 2.1 (lightning indexer).
    """
    dim = (write.key_TI.shape[1],)
    k_TI = F.layer_norm(write.key_TI.float(), dim, write.weight_I, write.bias_I, _EPS)
    k_TI = k_TI.to(write.key_TI.dtype)
    split = 2 * write.rotation.cos_Tr.shape[1]
    turned_TR = apply_rope(k_TI[:, :split], write.rotation)
    write.cache.write(write.slot_T, torch.cat((turned_TR, k_TI[:, split:]), 1))
