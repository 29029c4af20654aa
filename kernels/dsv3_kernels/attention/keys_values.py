"""Expanded keys and values, as prefill attention takes them."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class KeysValues:
    """Expanded keys and values of S tokens.

    Attributes:
        k_SHN: [S, H, N] expanded part of the keys.
        k_SHR: [S, H, R] rotated part of the keys; may be a view that repeats one head's.
        v_SHV: [S, H, V] values.
    """

    k_SHN: Tensor
    k_SHR: Tensor
    v_SHV: Tensor

    def rows(self, start: int, stop: int) -> "KeysValues":
        """Return tokens start to stop."""
        return KeysValues(self.k_SHN[start:stop], self.k_SHR[start:stop], self.v_SHV[start:stop])
