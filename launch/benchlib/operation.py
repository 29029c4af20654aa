"""One operation of a step and its floor.

The floor is max(bytes / read bandwidth, FLOPs / matrix peak); for an exchange, its latency plus
bytes / link bandwidth.

Source: the roofline model (Williams, Waterman, Patterson 2009).
"""

from collections.abc import Iterable
from dataclasses import dataclass

from benchlib.hardware import Hardware


@dataclass(frozen=True, slots=True)
class Op:
    """One operation of a step on one rank, `count` times.

    Attributes:
        name: dotted name that begins with the module.
        flops, bytes: FLOPs and bytes of device memory of one execution.
        dtype: format of the matrix product.
        count: number of executions in all layers together.
        wire: bytes that this rank sends per execution.
        span: number of neighbouring ranks in an exchange; 0 if it is none.
    """

    name: str
    flops: float = 0.0
    bytes: float = 0.0
    dtype: str = "bf16"
    count: int = 1
    wire: float = 0.0
    span: int = 0

    def _parts(self, hw: Hardware) -> dict[str, float]:
        peak = {"fp8": hw.fp8, "fp32": hw.fp32}.get(self.dtype, hw.bf16)
        parts = {"bytes": self.bytes / hw.read, "flops": self.flops / peak}
        if self.span > 1:
            is_near = self.span <= hw.ranks_per_host
            if is_near:
                parts["link"] = hw.link_latency + self.wire / hw.link
            else:
                parts["link"] = hw.net_latency + self.wire / hw.net
        return parts

    def bound(self, hw: Hardware) -> str:
        """Return the resource that bounds the operation: "bytes", "flops" or "link"."""
        parts = self._parts(hw)
        return max(parts, key=lambda name: parts[name])

    def seconds(self, hw: Hardware) -> float:
        """Return the floor in seconds of all executions."""
        return self.count * max(self._parts(hw).values())


def floor_seconds(ops: Iterable[Op], hw: Hardware) -> float:
    """Return the sum of the floors, without overlap and without launches."""
    return sum(op.seconds(hw) for op in ops)
