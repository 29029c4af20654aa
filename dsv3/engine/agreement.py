"""Checks that all ranks load the same model: different weights would give wrong answers.

A converted directory has a digest of its weights. Ranks that read the very same directory need no
comparison. Otherwise the ranks that share a directory read the weights' identity, each a part.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from functools import reduce
from operator import xor
from pathlib import Path

import torch

from dsv3.checkpoint.identity import model_identity
from dsv3.checkpoint.reader import Source
from dsv3.config import ModelConfig
from dsv3.distributed.collective_errors import collective_errors, raised_everywhere
from dsv3.distributed.mesh import Mesh
from dsv3.distributed.rendezvous import Peer
from dsv3.errors import ConfigError


def check_same(mesh: Mesh, facts: Mapping[str, str]) -> None:
    """Compare facts over the ranks. A collective.

    Raises:
        ConfigError: on every rank, naming the first fact that differs and two ranks.
    """
    everyone = [json.loads(text) for text in gather_texts(mesh, json.dumps(dict(facts)))]
    for name, first in everyone[0].items():
        for rank, theirs in enumerate(everyone):
            if theirs[name] != first:
                name_of = mesh.watchdog.name_of
                error = ConfigError(
                    f"the ranks do not load the same model: {name} is {first} on {name_of(0)} and "
                    f"{theirs[name]} on {name_of(rank)}"
                )
                raise raised_everywhere(error, mesh)


def gather_texts(mesh: Mesh, text: str) -> list[str]:
    """Return the texts of all ranks, in rank order. A collective."""
    mine = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    sizes = mesh.control.all_gather(torch.tensor([len(mine)])).flatten().tolist()
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[: len(mine)] = mine
    rows = mesh.control.all_gather(padded)
    return [bytes(row[:size].tolist()).decode() for row, size in zip(rows, sizes, strict=True)]


def config_facts(config: ModelConfig) -> dict[str, str]:
    """Return the fields of a model's configuration as text."""
    names = [f.name for f in fields(ModelConfig) if f.compare]
    return {f"{name} of the model": str(getattr(config, name)) for name in names}


def agree_on_model(mesh: Mesh, source: Source, placement_file: str, wants_identity: bool) -> int:
    """Compare the ranks' configurations, weights and expert placements. A collective.

    Args:
        mesh: the ranks.
        source: this rank's open checkpoint.
        placement_file: this rank's file of expert placement, or empty.
        wants_identity: read the identity even if the ranks can be compared without it.

    Returns:
        the identity of the weights; 0 if it was not read.

    Raises:
        ConfigError: on every rank, they differ.
        CheckpointError: a file cannot be read.
    """
    if mesh.world.size == 1:
        return model_identity(source) if wants_identity else 0
    check_same(mesh, config_facts(source.config))
    place = source.model_digest or _directory(mesh.layout.rank, source.path)
    places = gather_texts(mesh, place)
    sharers = [rank for rank, other in enumerate(places) if other == place]
    is_compared = len(sharers) < len(places) and not source.model_digest
    part = 0
    placement = ""
    with collective_errors(mesh, "comparing the checkpoints of the ranks"):
        if placement_file:
            placement = hashlib.sha256(Path(placement_file).read_bytes()).hexdigest()
        if wants_identity or is_compared:
            index = sharers.index(mesh.layout.rank)
            part = model_identity(source, index, len(sharers), mesh.watchdog.advance)
    parts = [int(text, 16) for text in gather_texts(mesh, f"{part:x}")]
    identity = reduce(xor, (parts[rank] for rank in sharers))
    kind = "a converted one" if source.model_digest else "one"
    weights = f"{kind} with digest {(source.model_digest or f'{identity:032x}')[:16]}"
    facts = {"its checkpoint": weights, "the expert placement's file": placement[:16] or "none"}
    check_same(mesh, facts)
    return identity


def _directory(rank: int, path: Path) -> str:
    """Return a name that only ranks which read the very same directory share."""
    status = path.resolve().stat()
    return f"{Peer.here(rank).boot} {status.st_dev} {status.st_ino}"
