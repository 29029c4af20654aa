"""The order of programs in the interpreter (see `conftest`): another one, and each just once."""

import pytest
import torch

from dsv3_kernels._triton import HAS_TRITON, tl, triton


@triton.jit
def _turn_kernel(count_ptr, turn_ptr):
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(turn_ptr + program, tl.atomic_add(count_ptr, 1))


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
def test_programs_take_turns() -> None:
    count, turn = torch.zeros(1, dtype=torch.int32), torch.full((15,), -1, dtype=torch.int32)
    _turn_kernel[(5, 3)](count, turn)
    assert turn.tolist() != list(range(15)) and sorted(turn.tolist()) == list(range(15))
