"""Sets up the lower cache tiers: host memory on every rank, a directory on disk."""

import logging
import os
import shutil
from hashlib import blake2b
from pathlib import Path

from dsv3.cache.disk import UNIT, DiskFiles, UnitFormat, UnitShard
from dsv3.cache.disk_index import DiskIndex
from dsv3.cache.host import HostPool
from dsv3.cache.pool import CachePool
from dsv3.cache.tiers import Tiers
from dsv3.config import ModelConfig
from dsv3.distributed.collective_errors import collective_errors
from dsv3.distributed.mesh import Mesh
from dsv3.engine.agreement import gather_texts
from dsv3.engine.page_mover import PageMover
from dsv3.errors import ConfigError, os_errors_as
from dsv3.settings import EngineConfig

log = logging.getLogger(__name__)


def make_tiers(
    mesh: Mesh,
    settings: EngineConfig,
    config: ModelConfig,
    cache: CachePool,
    num_host_pages: int,
    identity: int,
    numerics: str,
) -> tuple[PageMover | None, list[Tiers | None]]:
    """Return this rank's page mover, and each group's tiers for rank 0; None where there are none.

    Args:
        mesh: this rank and its peers. With a disk cache this is a collective.
        settings: where the disk cache is.
        config: the model.
        cache: the device's pages.
        num_host_pages: pages of host memory.
        identity: identity of the weights; not used without a disk cache.
        numerics: name of the arithmetic, since entries of another one differ.
    """
    groups = range(mesh.layout.dp)
    if not num_host_pages:
        return None, [None for _ in groups]
    host = HostPool(cache, num_host_pages)
    page_size = cache.layout.page_size
    if settings.disk_cache is None:
        tiers: list[Tiers | None] = [Tiers(num_host_pages, page_size) for _ in groups]
        return PageMover(host, None, mesh.control), tiers
    root, size = settings.disk_cache
    limit = size.of(_disk_bytes(root, settings)) if size.share else size.num_bytes
    session = gather_texts(mesh, os.urandom(8).hex())[0]  # rank 0's name for this run
    about = f"{numerics} {config}".encode()
    fmt = UnitFormat.make(
        blake2b(identity.to_bytes(16, "big") + about).digest(), config, cache.layout
    )
    folder = root / fmt.key.hex()
    if limit < fmt.file_bytes:
        raise ConfigError(
            f"{settings.given('kv_disk_cache')} is too small: a file of {UNIT} tokens takes "
            f"{fmt.file_bytes} bytes"
        )
    _open_folder(mesh, folder, session, settings.named("kv_disk_cache"))
    shard = UnitShard(config, cache.layout, mesh.layout.tp_rank)
    files = DiskFiles(folder, session, fmt, shard, host.pages.numpy())
    tiers = [None]
    if mesh.layout.rank == 0:
        index = DiskIndex(root, limit, fmt, files)
        tiers = [Tiers(num_host_pages, page_size, index)]
        log.info("%s", index.describe())
    return PageMover(host, files, mesh.control), tiers


def _disk_bytes(folder: Path, settings: EngineConfig) -> int:
    """Return the bytes of a directory's file system, used ones included: later runs agree."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    with os_errors_as(ConfigError, f"{settings.named('kv_disk_cache')}: {folder}"):
        return shutil.disk_usage(folder).total


def _open_folder(mesh: Mesh, folder: Path, session: str, setting: str) -> None:
    """Make a folder, and check that all ranks see the same one. A collective."""
    probe = folder / f"{session}.tmp"
    with collective_errors(mesh, "opening the disk cache"):
        if mesh.layout.rank == 0:
            with os_errors_as(ConfigError, f"{setting}: {folder}"):
                folder.mkdir(parents=True, exist_ok=True)
                probe.touch()
    with collective_errors(mesh, "opening the disk cache"):
        if not probe.exists():
            raise ConfigError(f"{setting}: {folder.parent} is not shared by all hosts")
    if mesh.layout.rank == 0:
        probe.unlink()
