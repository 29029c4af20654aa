"""Data-parallel groups: the choice of a group for a request, and the metrics of all of them.

A request goes to the group that has least to compute for it, work ahead of it included. Waiting
requests of a full group move to one with free places.
"""

from collections.abc import Sequence as Ordered
from typing import NamedTuple

from dsv3.engine.metrics import Metrics
from dsv3.engine.scheduler import Scheduler
from dsv3.engine.sequence import Sequence


def choose_group(schedulers: Ordered[Scheduler], seq: Sequence) -> int:
    """Return the group for a new sequence."""
    if len(schedulers) == 1:
        return 0
    costs = [scheduler.cost(seq) for scheduler in schedulers]
    return costs.index(min(costs))


def rebalance_waiting(schedulers: Ordered[Scheduler]) -> None:
    """Move waiting requests of full groups to groups with free places; after a step is planned.

    Not before: a sequence that lost its pages may have a token in flight, on its old group's ranks.
    """
    full = [scheduler for scheduler in schedulers if scheduler.is_full]
    if not full:
        return
    for group, scheduler in enumerate(schedulers):
        while scheduler.num_free_places > 0:
            longest = max(full, key=lambda other: len(other.waiting))
            if len(longest.waiting) <= len(scheduler.waiting):
                break
            seq = longest.pop_last_waiting()
            seq.group = group
            scheduler.add(seq)


class PageStates(NamedTuple):
    """Numbers of pages of a group's cache, which add up to all of them.

    Attributes:
        used: held by one sequence, or pinned.
        shared: held by several sequences.
        cached: held by none, and kept for reuse.
        free: empty.
    """

    used: int
    shared: int
    cached: int
    free: int


def page_states(scheduler: Scheduler) -> PageStates:
    """Return the states of a group's pages; any thread may ask."""
    pages = scheduler.pages
    free = pages.num_free
    cached = pages.num_idle
    shared = pages.num_shared
    return PageStates(max(0, pages.num_pages - free - cached - shared), shared, cached, free)


def update_gauges(schedulers: Ordered[Scheduler], metrics: Metrics) -> None:
    """Write the state of all groups together into the metrics."""
    metrics.waiting = sum(len(each.waiting) for each in schedulers)
    metrics.running = sum(len(each.running) for each in schedulers)
    metrics.pages_free = sum(each.pages.num_free for each in schedulers)
    metrics.pages_idle = sum(each.pages.num_idle for each in schedulers)
    num_pages = sum(each.pages.num_pages for each in schedulers)
    metrics.pages_used = num_pages - metrics.pages_free - metrics.pages_idle
    metrics.pages_pinned = sum(each.num_pinned for each in schedulers)
    metrics.evictions = sum(each.tree.num_evicted for each in schedulers if each.tree is not None)
    tiers = [each.tiers for each in schedulers if each.tiers is not None]
    metrics.offloads = sum(each.num_offloaded for each in tiers)
    metrics.host_hits = sum(each.num_restored for each in tiers)
    metrics.disk_hits = sum(each.num_fetched for each in tiers)
    metrics.disk_writes = sum(each.num_written for each in tiers)
    metrics.disk_bytes = sum(each.disk_bytes for each in tiers)
