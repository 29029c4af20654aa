"""A GPU's program as an emulator needs it: shared memory, barriers and groups of warps.

Copies to shared memory arrive as late as they can; from their issue until then their place holds
NaN. Products read their operands when they are waited for. Barriers have phases and counts.
Partitions are threads that take turns in a random order.

What could go wrong in another order than the one that happened is found as well: each partition
has a clock of what it knows of the others, which only barriers pass on, and a second one of what it
knows to be fenced. Reading or writing memory that another one writes, or writing what another
one reads, without knowing that it has finished, is a `Race`. Partitions that all wait are a
`Deadlock`.
"""

import random
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class Race(AssertionError):
    """Memory is used in an order that nothing ensures."""


class Deadlock(AssertionError):
    """Every partition waits for another one."""


class _Stopped(BaseException):
    """Ends a partition because another one has failed."""


class Pointer:
    """Addresses in a tensor: the values from its first to its last one, and offsets into them."""

    def __init__(self, memory: Tensor, offset: Any = 0) -> None:
        self.memory, self.offset = memory, torch.as_tensor(offset, dtype=torch.int64)

    @staticmethod
    def to(x: Tensor) -> "Pointer":
        last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
        return Pointer(x.as_strided((last + 1,), (1,)))

    @property
    def dtype(self) -> SimpleNamespace:
        return SimpleNamespace(element_ty=self.memory.dtype)

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.memory, self.offset + offset)

    def __getitem__(self, index: Any) -> "Pointer":
        return Pointer(self.memory, self.offset[index])

    def at(self, mask: Any) -> tuple[Tensor, Tensor]:
        """Return offsets, 0 where they are masked, and the mask."""
        offset, mask = torch.broadcast_tensors(self.offset, torch.as_tensor(mask))
        inside = (offset >= 0) & (offset < len(self.memory))
        assert bool((inside | ~mask).all()), "an address lies outside of its tensor"
        return offset.masked_fill(~mask, 0), mask

    def load(self, mask: Any, other: float) -> Tensor:
        offset, mask = self.at(mask)
        return self.memory[offset].masked_fill(~mask, other)

    def store(self, value: Tensor, mask: Any) -> None:
        offset, mask = self.at(mask)
        self.memory[offset[mask]] = value.to(self.memory.dtype).expand(offset.shape)[mask]


@dataclass
class Region:
    """A piece of shared memory that is written and read as a whole.

    Attributes:
        write: who last wrote it, and when by its clock.
        reads: who read that, and when.
    """

    name: str
    write: tuple[str, int] | None = None
    reads: Counter[str] = field(default_factory=Counter)


@dataclass
class Barrier:
    """An mbarrier: the arrivals that its phase still lacks, and what the arrived ones know."""

    count: int
    lacks: int
    phase: int = 0
    arrived: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    passed: tuple[Counter[str], Counter[str]] = (Counter(), Counter())

    def arrive(self, count: int, knows: Counter[str], fenced: Counter[str]) -> None:
        self.arrived = self.arrived[0] | knows, self.arrived[1] | fenced
        self.lacks -= count
        assert self.lacks >= 0, f"{-self.lacks} arrivals more than the barrier takes"
        if self.lacks == 0:
            self.lacks, self.phase, self.passed = self.count, self.phase + 1, self.arrived


@dataclass
class Partition:
    """A group of warps.

    Attributes:
        knows, fenced: the clocks.
        copies: what it has issued that has not arrived yet, in order.
        products: those in flight.
        is_apart: whether its threads may be at different places of what they do in memory.
    """

    name: str
    knows: Counter[str]
    fenced: Counter[str]
    copies: list[Callable[[], None]] = field(default_factory=list)
    products: list["Product"] = field(default_factory=list)
    is_apart: bool = False
    ready: Callable[[], bool] = lambda: True
    waits_for: str = ""
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    done: bool = False
    error: BaseException | None = None

    def tick(self) -> int:
        self.knows[self.name] += 1
        return self.knows[self.name]


class Shared:
    """A descriptor of shared memory."""

    def __init__(self, machine: "Machine", data: Tensor, regions: list[Region]) -> None:
        self.machine, self.data, self.regions = machine, data, regions
        self.shape, self.dtype = tuple(data.shape), data.dtype

    def index(self, i: Any) -> "Shared":
        return Shared(self.machine, self.data[int(i)], [self.regions[int(i)]])

    def permute(self, order: tuple[int, ...]) -> "Shared":
        return Shared(self.machine, self.data.permute(order), self.regions)

    def store(self, value: Tensor) -> None:
        assert value.dtype == self.dtype and value.shape == self.data.shape, f"{value.shape=}"
        self.machine.turn()
        self.machine.writes(self)
        self.data.copy_(value)

    def load(self, layout: Any) -> Tensor:
        self.machine.turn()
        self.machine.reads(self)
        return self.data.clone()


class Product:
    """A product of matrices in flight: not a number before it is waited for."""

    def __init__(self, a: Any, b: Shared, acc: Any, use_acc: bool) -> None:
        self.a, self.b, self.acc, self.use_acc, self.value = a, b, acc, use_acc, None

    def finish(self) -> None:
        a, b = (x.data.float() if isinstance(x, Shared) else x.float() for x in (self.a, self.b))
        acc = self.acc.value if isinstance(self.acc, Product) else self.acc
        self.value = a @ b + (acc if self.use_acc else 0)


class Machine:
    """One program's shared memory, barriers and partitions."""

    def __init__(self, program: tuple[int, ...], grid: tuple[int, ...], seed: int) -> None:
        self.program, self.grid, self.random = program, grid, random.Random(seed)
        self.now = Partition("kernel", Counter(), Counter())
        self.partitions: list[Partition] = []
        self.barriers: dict[int, Barrier] = {}
        self.back = threading.Semaphore(0)
        self.stopped = False

    def turn(self, ready: Callable[[], bool] = lambda: True, waits_for: str = "") -> None:
        """Let others go on, until `ready`."""
        me = self.now
        if not self.partitions:
            assert ready(), f"the kernel waits for {waits_for}"
            return
        me.ready, me.waits_for = ready, waits_for
        self.back.release()
        me.go.acquire()
        if self.stopped:
            raise _Stopped

    def specialize(self, calls: list[tuple[Any, tuple[Any, ...]]], warps: Any, regs: Any) -> None:
        assert len(calls) == len(warps) + 1 == len(regs) + 1
        first = self.now
        for i, _ in enumerate(calls):
            part = Partition(f"partition {i}", first.knows.copy(), first.fenced.copy())
            self.partitions.append(part)
        threads = [
            threading.Thread(target=self._partition, args=(part, *call), daemon=True)
            for part, call in zip(self.partitions, calls, strict=True)
        ]
        for thread in threads:
            thread.start()
        try:
            self._take_turns()
        finally:
            self.stopped = True
            for part in self.partitions:
                part.go.release()
            for thread in threads:
                thread.join()

    def _partition(self, part: Partition, function: Any, args: tuple[Any, ...]) -> None:
        part.go.acquire()
        try:
            if not self.stopped:
                function(*args)
                assert not part.products, f"{part.name} leaves products in flight"
        except _Stopped:
            pass
        except BaseException as error:
            part.error = error
        part.done = True
        self.back.release()

    def _take_turns(self) -> None:
        while left := [part for part in self.partitions if not part.done]:
            able = [part for part in left if part.ready()]
            late = [part for part in self.partitions if part.copies]
            if late and (not able or self.random.random() < 0.1):
                self.random.choice(late).copies.pop(0)()
                continue
            if not able:
                waits = "; ".join(f"{part.name} waits for {part.waits_for}" for part in left)
                raise Deadlock(waits)
            self.now = self.random.choice(able)
            self.now.go.release()
            self.back.acquire()
            if self.now.error is not None:
                raise self.now.error
        assert not any(part.copies for part in self.partitions), "copies are under way at the end"

    def reads(self, place: Shared, by_product: bool = False) -> None:
        for region in place.regions:
            if region.write is None:
                raise Race(f"{self.now.name} reads {region.name}, which nobody has written")
            who, when = region.write
            if self.now.knows[who] < when:
                raise Race(f"{self.now.name} reads {region.name} while {who} may write it")
            if by_product and self.now.fenced[who] < when:
                raise Race(f"{self.now.name} multiplies {region.name} without a fence")
            region.reads[self.now.name] = self.now.tick()
        self.now.is_apart = True

    def writes(self, place: Shared, by_copy: bool = False) -> None:
        for region in place.regions:
            for who, when in [*region.reads.items(), *([region.write] if region.write else [])]:
                if self.now.knows[who] < when:
                    raise Race(f"{self.now.name} writes {region.name} while {who} may use it")
            if self.now.is_apart and self.now.name in region.reads:
                raise Race(f"threads of {self.now.name} write {region.name} while others read it")
            when, who = self.now.tick(), self.now.name + (" copies" if by_copy else "")
            region.write, region.reads = (who, when), Counter()
        self.now.is_apart = self.now.is_apart or not by_copy

    def copy_async(self, place: Shared, source: Pointer, mask: Any = True) -> None:
        self.turn()
        assert source.offset.shape == place.data.shape, f"{source.offset.shape} to {place.shape}"
        self.writes(place, by_copy=True)
        place.data.fill_(float("nan"))

        def arrive() -> None:
            place.data.copy_(source.load(mask, 0))

        self.now.copies.append(arrive)

    def arrive_after_copies(self, place: Shared, increment_count: bool) -> None:
        self.turn()
        assert not increment_count, "counts arrivals that nobody expects"
        knows, fenced, barrier = self.now.knows.copy(), self.now.fenced.copy(), self._barrier(place)
        knows[f"{self.now.name} copies"] = knows[self.now.name]
        self.now.copies.append(lambda: barrier.arrive(128, knows, fenced))

    def wait_group(self, outstanding: int) -> None:
        assert outstanding == 0
        for copy in self.now.copies:
            copy()
        self.now.copies.clear()
        self.now.knows[f"{self.now.name} copies"] = self.now.tick()

    def fence(self) -> None:
        self.now.fenced |= self.now.knows

    def thread_barrier(self) -> None:
        self.now.is_apart = False

    def init(self, place: Shared, count: int) -> None:
        self.barriers[id(place.regions[0])] = Barrier(count, count)

    def _barrier(self, place: Shared) -> Barrier:
        if id(place.regions[0]) not in self.barriers:
            raise Race(f"{self.now.name} uses {place.regions[0].name}, which is no barrier yet")
        return self.barriers[id(place.regions[0])]

    def arrive(self, place: Shared, count: int = 1) -> None:
        self.turn()
        if self.now.is_apart:
            raise Race(f"one thread of {self.now.name} arrives, others may use memory still")
        self._barrier(place).arrive(count, self.now.knows, self.now.fenced)
        self.now.tick()

    def wait(self, place: Shared, phase: Any) -> None:
        barrier, name = self._barrier(place), place.regions[0].name
        self.turn(lambda: barrier.phase % 2 != int(phase), f"phase {int(phase)} of {name}")
        self.now.knows |= barrier.passed[0]
        self.now.fenced |= barrier.passed[1]

    def multiply(
        self, a: Any, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool = False
    ) -> Any:
        self.turn()
        for operand in (a, b):
            if isinstance(operand, Shared):
                self.reads(operand, by_product=True)
        self.now.products.append(Product(a, b, acc, use_acc))
        return self.now.products[-1] if is_async else self.wait_products(0, self.now.products[-1:])

    def wait_products(self, outstanding: int, deps: Any) -> Any:
        self.turn()
        products = self.now.products
        while len(products) > outstanding:
            product = products.pop(0)
            for operand in (product.a, product.b):
                if isinstance(operand, Shared):
                    self.reads(operand, by_product=True)
            product.finish()
        found = tuple(x if getattr(x, "value", x) is None else x.value for x in deps)
        return found[0] if len(found) == 1 else found

    def allocate(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
        """Return poisoned memory; that of three dims, or of barriers, is indexed by its first."""
        parts = shape[0] if len(shape) == 3 or dtype in (torch.int64, torch.float32) else 1
        line = sys._getframe(2).f_lineno
        regions = [Region(f"memory of line {line}, part {i}") for i in range(parts)]
        poison = float("nan") if dtype.is_floating_point else -1
        return Shared(self, torch.full(shape, poison, dtype=dtype), regions)
