"""Find the checkpoint that a user names: a directory, or a name on the hub to be downloaded."""

import logging
from pathlib import Path

from dsv3.checkpoint.hub import Revision, fetch, fetch_beside, resolve, snapshot
from dsv3.checkpoint.hub_cache import hub_name
from dsv3.checkpoint.hub_files import Download
from dsv3.config_files import DEMO
from dsv3.distributed.collective_errors import collective_errors, raised_everywhere
from dsv3.distributed.mesh import Mesh
from dsv3.engine.agreement import gather_texts
from dsv3.errors import ConfigError

log = logging.getLogger(__name__)


def locate_checkpoint(given: str | Path | None, mesh: Mesh) -> Path:
    """Return the directory of a checkpoint; the demo model's if none is given.

    The commit of a hub name is decided once, by rank 0. The first rank of every host downloads it,
    the others wait; hosts that share a cache wait for each other's files. A collective.

    Raises:
        CheckpointError: it cannot be downloaded.
        ConfigError: ranks were given a name, others a directory.
    """
    name = hub_name(given)
    rank = mesh.layout.rank
    revision = Revision("")
    with collective_errors(mesh, "asking the hub"):
        if name is not None and rank == 0:
            revision = resolve(name)
    if mesh.world.size > 1:
        commit = _commit_of_first(mesh, revision.commit, name is not None)
        revision = revision if rank == 0 else Revision(commit)
    if name is None:
        return _directory(given)
    is_first = mesh.host_of_rank.index(mesh.host_of_rank[rank]) == rank
    download = Download(log.info, shows_bar=rank == 0)
    stage = f"downloading {name}"
    mesh.watchdog.enter(stage, may_rest=not is_first)
    with collective_errors(mesh, stage), mesh.watchdog.counting(lambda: download.num_bytes):
        if is_first:
            fetch(name, revision, download)
            mesh.watchdog.enter(stage, may_rest=True)  # for the other hosts
    return snapshot(name, revision.commit)


def _commit_of_first(mesh: Mesh, commit: str, is_name: bool) -> str:
    """Return rank 0's commit; it is empty where all were given a directory."""
    texts = gather_texts(mesh, f"{'name' if is_name else 'path'} {commit}")
    kinds = [text.split(" ")[0] for text in texts]
    for other, kind in enumerate(kinds):
        if kind != kinds[0]:
            names = {"name": "a name on the hub", "path": "a directory"}
            where = mesh.watchdog.name_of
            error = ConfigError(
                f"the checkpoint is {names[kinds[0]]} on {where(0)} and {names[kind]} on "
                f"{where(other)}; give the same on all"
            )
            raise raised_everywhere(error, mesh)
    return texts[0].split(" ")[1]


def locate_description(given: str | Path | None) -> Path:
    """Return a directory with the configuration and the tokenizer of a checkpoint.

    Of a hub name, no weights are downloaded.
    """
    name = hub_name(given)
    return _directory(given) if name is None else fetch_beside(name, Download(log.info))


def _directory(given: str | Path | None) -> Path:
    """Return a directory that was given, or the demo model's.

    Raises:
        ConfigError: none is given, and this is no checkout of dsv3, which has the demo model.
    """
    if given is None and not DEMO.exists():
        raise ConfigError("give a checkpoint: the demo model is not installed with the package")
    return Path(given or DEMO)
