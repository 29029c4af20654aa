"""Replay a trace of requests through the engine's prefix tree and count its hits.

The trace is a JSON Lines file with a `hash_ids` list per request, one id per block of its prompt;
other fields, such as `timestamp`, are ignored. Requests run one at a time: leading blocks in the
cache count as hits, then all blocks of the request are cached, then blocks are evicted down to the
capacity.
"""

import argparse
import json
from collections.abc import Hashable, Iterable
from pathlib import Path

from benchlib.flags import at_least
from benchlib.report import Report
from dsv3.cache.eviction import POLICIES, make_policy
from dsv3.cache.pages import PageAllocator
from dsv3.cache.prefix import PrefixTree
from dsv3.errors import ConfigError


def read_trace(path: Path) -> list[list[int]]:
    """Return the blocks of each request; every distinct id of the trace becomes a small integer."""
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
                message = f"{path}:{index}: not a request with hash_ids: {error}"
                raise ConfigError(message) from error
    return requests


def replay(requests: Iterable[list[int]], capacity: int, policy: str) -> dict[str, float]:
    """Return counts and the hit rate of `requests`; each block is a page of one token."""
    requests = list(requests)
    longest = max(map(len, requests), default=0)
    # A request is cached whole before eviction, so there must be pages for it beyond the capacity.
    pages = PageAllocator(1 + capacity + longest)
    tree = PrefixTree(pages, 1, make_policy(policy, capacity))
    num_hits = num_blocks = 0
    for blocks in requests:
        match = tree.match(blocks)
        tree.hold(match)
        tree.count(match)
        request_pages = match.pages + pages.allocate(len(blocks) - match.num_tokens)
        tree.insert(blocks, len(blocks), request_pages)
        pages.release(request_pages)
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


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    add = parser.add_argument
    add("trace", type=Path, help="JSON Lines with hash_ids")
    capacities = [1000, 3000, 10000, 30000]
    text = "blocks that the cache holds"
    add("--capacity", type=at_least(0), nargs="+", default=capacities, help=text)
    text = "eviction policies"
    add("--policy", nargs="+", choices=POLICIES, default=["lru", "cost"], help=text)


def run(args: argparse.Namespace) -> Report:
    """Replay the trace with every policy at every capacity."""
    if not args.trace.is_file():
        raise ConfigError(f"{args.trace} is not a file")
    requests = read_trace(args.trace)
    report = Report("cache", x_label="capacity in blocks", y_label="hit rate in %")
    for policy in args.policy:
        rates = [100 * replay(requests, size, policy)["hit_rate"] for size in args.capacity]
        for capacity, rate in zip(args.capacity, rates, strict=True):
            report.rows.append({"policy": policy, "capacity": capacity, "hit rate %": rate})
        report.series[policy] = (args.capacity, rates)
    report.setting = {"trace": str(args.trace)}
    return report
