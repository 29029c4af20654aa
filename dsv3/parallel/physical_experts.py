"""Mapping from the router's (logical) experts to physical experts, on the device.

All tables are updated in place, so that a captured CUDA graph uses the new values.
"""

import torch
from torch import Tensor

from dsv3.distributed.mesh import Mesh
from dsv3.parallel.expert_placement import Placement


class PhysicalExperts:
    """The physical experts of one layer, and the number of tokens of each logical expert.

    A physical expert is a slot of `Placement`: an expert or one of its copies.

    Args:
        placement: of all layers.
        layer: index of the layer.
        mesh: this rank.

    Attributes:
        local_experts: logical experts in this rank's slots at the start.
        load_E: [E] int64 tokens of every logical expert since the tensor was last zeroed.
    """

    def __init__(self, placement: Placement, layer: int, mesh: Mesh) -> None:
        self.layer = layer
        self.local_experts = placement.local_experts(layer, mesh.layout.ep_rank)
        self._dp_rank = mesh.layout.dp_rank
        slots, copies = placement.copies(layer)
        self._slot_EC = torch.from_numpy(slots).to(mesh.device)
        self._copies_E = torch.from_numpy(copies).to(mesh.device)
        self.load_E = torch.zeros_like(self._copies_E)

    def place(self, placement: Placement) -> None:
        """Use another placement from now on."""
        slots, copies = placement.copies(self.layer)
        self._slot_EC.copy_(torch.from_numpy(slots))
        self._copies_E.copy_(torch.from_numpy(copies))

    def __call__(self, ids_TK: Tensor) -> Tensor:
        """Return the physical expert for each chosen logical expert, [T, K]; count the tokens.

        Tokens are distributed over an expert's copies in turn. -1 (no expert) stays -1 and is not
        counted.
        """
        is_none_TK = ids_TK < 0
        ids_TK = ids_TK.clamp_min(0)
        self.load_E.index_add_(0, ids_TK.flatten(), (~is_none_TK).long().flatten())
        turn_T1 = torch.arange(len(ids_TK), device=ids_TK.device).unsqueeze(1) + self._dp_rank
        slot_TK = self._slot_EC[ids_TK, turn_T1 % self._copies_E[ids_TK]]
        return slot_TK.masked_fill(is_none_TK, -1)
