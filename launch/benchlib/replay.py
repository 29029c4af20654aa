"""Replay a trace of requests through the engine's prefix tree and count its hits.

The trace is a JSON Lines file with a `hash_ids` list per request, one id per block of its prompt
(and a `timestamp`, which is not needed). One request at a time: its leading blocks that are cached
count as hits, then all its blocks are cached, then blocks are evicted down to the capacity.
"""

import json
from collections.abc import Hashable, Iterable
from pathlib import Path

from dsv3.cache.eviction import make_policy
from dsv3.cache.pages import PageAllocator
from dsv3.cache.prefix import PrefixTree
from dsv3.errors import ConfigError


def read_trace(path: Path) -> list[list[int]]:
    """Return the blocks of each request as small integers, equal where the trace's ids are."""
    number: dict[Hashable, int] = {}
    requests = []
    with path.open(encoding="utf-8") as lines:
        for index, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                blocks = json.loads(line)["hash_ids"]
                requests.append([number.setdefault(block, len(number)) for block in blocks])
            except (ValueError, KeyError, TypeError) as error:
                what = f"{path}:{index}: not a request with hash_ids: {error}"
                raise ConfigError(what) from error
    return requests


def replay(requests: Iterable[list[int]], capacity: int, policy: str) -> dict[str, float]:
    """Return the counts and the hit rate of `requests`, a block being a page of one token."""
    requests = list(requests)
    longest = max(map(len, requests), default=0)
    # A request is cached whole before anything is evicted, so its blocks need room beside the rest.
    pages = PageAllocator(1 + capacity + longest)
    tree = PrefixTree(pages, 1, make_policy(policy, capacity))
    num_hits = num_blocks = 0
    for blocks in requests:
        match = tree.match(blocks)
        tree.hold(match)
        tree.count(match)
        held = match.pages + pages.allocate(len(blocks) - match.num_tokens)
        tree.insert(blocks, len(blocks), held)
        pages.release(held)
        tree.make_room(longest)
        num_hits += match.num_tokens
        num_blocks += len(blocks)
    return {
        "requests": len(requests),
        "blocks": num_blocks,
        "hits": num_hits,
        "evictions": tree.num_evicted,
        "hit_rate": num_hits / max(1, num_blocks),
    }
