"""Mapping from the router's (logical) experts to physical experts, on the device.

All tables are updated in place, so that a captured CUDA graph uses the new values.
"""

import torch
from torch import Tensor

from dsv3.distributed.mesh import Mesh
from dsv3.parallel.expert_placement import Placement


class PhysicalExperts:
    """The physical experts of one layer, and the number of tokens of each logical expert.

    A physical expert is one copy of an expert, at its place in `Placement`.

    Args:
        placement: of all layers.
        layer: index of the layer.
        mesh: this rank.

    Attributes:
        local_experts: logical experts of this rank's physical experts at the start.
        load_E: [E] int64 tokens of every logical expert since the tensor was last zeroed.
    """

    def __init__(self, placement: Placement, layer: int, mesh: Mesh) -> None:
        self.layer = layer
        self.local_experts = placement.local_experts(layer, mesh.layout.ep_rank)
        self._dp_rank = mesh.layout.dp_rank
        copies, counts = placement.copies(layer)
        self._copy_EC = torch.from_numpy(copies).to(mesh.device)
        self._count_E = torch.from_numpy(counts).to(mesh.device)
        self.load_E = torch.zeros_like(self._count_E)

    def place(self, placement: Placement) -> None:
        """Use another placement from now on."""
        copies, counts = placement.copies(self.layer)
        self._copy_EC.copy_(torch.from_numpy(copies))
        self._count_E.copy_(torch.from_numpy(counts))

    def __call__(self, ids_TK: Tensor) -> Tensor:
        """Return the physical expert for each chosen logical expert, [T, K]; count the tokens.

        Tokens are distributed over an expert's copies in turn. -1 (no expert) stays -1 and is not
        counted.
        """
        is_none_TK = ids_TK < 0
        ids_TK = ids_TK.clamp_min(0)
        self.load_E.index_add_(0, ids_TK.flatten(), (~is_none_TK).long().flatten())
        turn_T1 = torch.arange(len(ids_TK), device=ids_TK.device).unsqueeze(1) + self._dp_rank
        physical_TK = self._copy_EC[ids_TK, turn_T1 % self._count_E[ids_TK]]
        return physical_TK.masked_fill(is_none_TK, -1)
