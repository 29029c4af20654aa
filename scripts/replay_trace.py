#!/usr/bin/env python
"""Replay a trace of requests through the engine's prefix tree and report the hit rate.

The trace is a JSON Lines file with a `hash_ids` list per request, one id per block of its prompt
(and a `timestamp`, which is not needed). One request at a time: its leading blocks that are cached
count as hits, then all its blocks are cached, then blocks are evicted down to the capacity.

    scripts/replay_trace.py TRACE --capacity BLOCKS [--policy lru|cost] [--json]
"""

import argparse
import json
import sys
import time
from collections.abc import Hashable, Iterable
from pathlib import Path

from dsv3.cache.eviction import POLICIES, make_policy
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


def main() -> None:
    """Parse the command line and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("trace", type=Path, help="JSON Lines, one request with hash_ids per line")
    parser.add_argument("--capacity", type=int, required=True, help="blocks the cache holds")
    parser.add_argument("--policy", choices=POLICIES, default="cost")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    if args.capacity < 0:
        parser.error(f"--capacity {args.capacity} is negative")
    if not args.trace.is_file():
        parser.error(f"{args.trace} is not a file")
    start = time.perf_counter()
    try:
        requests = read_trace(args.trace)
    except ConfigError as error:
        parser.error(str(error))
    result = replay(requests, args.capacity, args.policy)
    result = {"policy": args.policy, "capacity": args.capacity, **result}
    result["seconds"] = round(time.perf_counter() - start, 3)
    if args.json:
        json.dump(result, sys.stdout)
        print()
        return
    print(
        f"{args.policy} with {args.capacity} blocks: hit rate {result['hit_rate']:.2%} "
        f"({result['hits']} of {result['blocks']} blocks, {result['requests']} requests, "
        f"{result['evictions']} evictions, {result['seconds']} s)"
    )


if __name__ == "__main__":
    main()
