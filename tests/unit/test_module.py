import torch
from torch import nn

from dsv3.parallel.module import Module


def test_attributes_are_those_that_torch_knows() -> None:
    module = Module()
    module.inner = nn.Linear(2, 3)
    for _ in range(2):
        module.weight = nn.Parameter(torch.zeros(2))
        assert (
            module.__dict__["weight"] is module.weight is dict(module.named_parameters())["weight"]
        )
    assert module.__dict__["inner"] is module.inner is dict(module.named_children())["inner"]
