"""The host-memory tier: every byte of every layer is offloaded and restored."""

import pytest
import torch

from dsv3.cache import host
from dsv3.cache.host import HostPool
from dsv3.cache.layout import CacheLayout, Plane
from dsv3.cache.pool import CachePool
from dsv3.distributed.collectives import SingleRank
from dsv3_kernels import Paging

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "layout",
    [
        CacheLayout((Plane("latent", 8, 6, (0, 1, 2), "fp32"),), Paging(64, 4, 1)),
        CacheLayout((Plane("latent", 8, 6, (0, 1, 2), "bf16"),), Paging(64)),
        CacheLayout((Plane("latent", 144, 128, (0, 1, 2), "fp8"),), Paging(64, 2, 0)),
        CacheLayout((Plane("heads", 20, 20, (0, 1, 2), "fp32"),), Paging(64)),
    ],
    ids=lambda layout: f"{layout.form} {layout.main.dtype}",
)
@pytest.mark.parametrize("block", [2, 64])
@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)],
)
def test_restored_pages_equal_offloaded_pages(
    layout: CacheLayout, device: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "_BLOCK", block)
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    cache = CachePool(layout, 9, torch.device(device), SingleRank())
    cache.planes[0].view(torch.uint8).random_(0, 255)
    before = cache.planes[0].clone()
    pool = HostPool(cache, 5)
    assert pool.num_bytes * 9 == cache.num_bytes * 5
    pages, host_pages = torch.tensor([2, 7, 4]), torch.tensor([3, 0, 4])
    pool.offload(pages, host_pages)
    # Work launched right after the offload must not change the offloaded data.
    cache.planes[0].zero_()
    pool.restore(host_pages, torch.tensor([1, 2, 3]))
    after, before = (x.view(3, 9, -1).view(torch.uint8) for x in (cache.planes[0], before))
    assert torch.equal(after[:, [1, 2, 3]], before[:, pages])
    assert not after[:, [0, 4, 5, 6, 7, 8]].any()
