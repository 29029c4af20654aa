"""From the router's experts to the physical slots that hold them, on the device.

Everything is changed in place, so that a CUDA graph goes on with the new values.
"""

import torch
from torch import Tensor

from dsv3.distributed.mesh import Mesh
from dsv3.parallel.expert_placement import Placement


class ExpertSlots:
    """The slots of one layer's experts, and how often each expert was chosen.

    Args:
        placement: of all layers.
        layer: which one this is.
        mesh: this rank.

    Attributes:
        held: experts in this rank's slots at the start.
        load_E: tokens of every expert since someone last set it to 0.
    """

    def __init__(self, placement: Placement, layer: int, mesh: Mesh) -> None:
        self.layer, self._dp_rank = layer, mesh.layout.dp_rank
        self.held = placement.held(layer, mesh.layout.ep_rank)
        slots, copies = (torch.from_numpy(table) for table in placement.copies(layer))
        self._slot_EC, self._copies_E = slots.to(mesh.device), copies.to(mesh.device)
        self.load_E = torch.zeros_like(self._copies_E)

    def place(self, placement: Placement) -> None:
        """Look for experts where this placement has them."""
        slots, copies = placement.copies(self.layer)
        self._slot_EC.copy_(torch.from_numpy(slots))
        self._copies_E.copy_(torch.from_numpy(copies))

    def __call__(self, ids_TK: Tensor) -> Tensor:
        """Return the slot for each chosen expert, [T, K]; tokens take turns among its copies.

        -1, for none, stays what it is and is not counted.
        """
        is_none_TK, ids_TK = ids_TK < 0, ids_TK.clamp_min(0)
        self.load_E.index_add_(0, ids_TK.flatten(), (~is_none_TK).long().flatten())
        turn_T1 = torch.arange(len(ids_TK), device=ids_TK.device).unsqueeze(1) + self._dp_rank
        slot_TK = self._slot_EC[ids_TK, turn_T1 % self._copies_E[ids_TK]]
        return slot_TK.masked_fill(is_none_TK, -1)
