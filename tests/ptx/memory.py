"""Memory with its checks: bounds, alignment, races, and shared memory that nobody wrote.

Global memory is that of the process itself, so that kernels read and write CPU tensors; a launch may touch its own tensors alone.
Threads run in lockstep here and on a GPU they do not, so races are looked for and not waited for: an access is a fault if another
thread touched the same byte, one of them writes, and no barrier lies between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from .values import UINT, Array

NOBODY, SEVERAL, EARLIER, ATOMIC = -1, -2, -3, -4  # beside the numbers of threads
Note = Callable[[Any, Array, int], None]  # "load", "store" or "atomic", addresses, bytes each


class FaultError(AssertionError):
    """What a GPU, or its memory checker, would not let pass."""


class _All:
    """All of the address space from `START` on, as integers of so many bytes."""

    START = 4096

    def __init__(self, width: int) -> None:
        self.__array_interface__ = {
            "data": (self.START, False),
            "shape": (2**47 // width,),
            "typestr": f"<u{width}",
            "version": 3,
        }


_PROCESS = {width: np.asarray(_All(width)) for width in (1, 2, 4, 8)}


def _place(address: Array, width: int, count: int) -> Array:
    return ((address - _All.START) // width)[:, None] + np.arange(count)


class _Touched:
    """Which thread touched each byte last, and its block."""

    def __init__(self, size: int) -> None:
        self.thread, self.block = np.full(size, NOBODY, np.int32), np.full(size, NOBODY, np.int32)

    def by_others(self, cells: Array, thread: Array, block: Array) -> Any:
        """True where another thread touched a byte and nothing orders that with these accesses."""
        who, where = self.thread[cells], self.block[cells]
        return (where != NOBODY) & ((where != block) | ((who != thread) & (who != EARLIER)))


class Global:
    """The allocations that a launch may touch, given by their first and last address."""

    def __init__(self, spans: Iterable[tuple[int, int]], threads: int, note: Note | None = None) -> None:
        merged: list[list[int]] = []
        for start, end in sorted(set(spans)):
            if merged and start <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], end)
            else:
                merged.append([start, end])
        self._starts, self._ends = (np.array([span[i] for span in merged], np.int64) for i in (0, 1))
        self._first = np.concatenate([[0], np.cumsum(self._ends - self._starts)]).astype(np.int64)
        self._threads, self._note = threads, note
        self._written, self._read = _Touched(self._first[-1]), _Touched(self._first[-1])

    def barrier(self, blocks: Array) -> None:
        """Orders what the threads of each block did with what they will do."""
        for touched in (self._written, self._read):
            touched.thread[np.isin(touched.block, blocks)] = EARLIER

    def _cells(self, kind: str, address: Array, size: int, thread: Array, what: str) -> Array:
        """The numbers of the bytes, (n, size), after the checks. What threads of a block read together counts once."""
        if (address % size).any():
            raise FaultError(f"{what}: misaligned, {int(address[address % size != 0][0]):#x}")
        span = np.searchsorted(self._starts, address, "right") - 1
        stray = (span < 0) | (address + size > self._ends[span]) if len(self._ends) else np.ones(len(address), bool)
        if stray.any():
            spans = [(hex(s), int(e - s)) for s, e in zip(self._starts, self._ends)]
            raise FaultError(
                f"{what}: {int(stray.sum())} out of bounds, first {int(address[stray][0]):#x}; allocated {spans}"
            )
        if self._note is not None:
            self._note(kind, np.unique(np.stack([thread // self._threads, address]), axis=1)[1], size)
        return (self._first[span] + address - self._starts[span])[:, None] + np.arange(size)

    def load(self, address: Array, width: int, count: int, thread: Array, what: str) -> Array:
        """(n, count) integers of so many bytes each."""
        cells = self._cells("load", address, width * count, thread, what)
        own, block = thread[:, None], (thread // self._threads)[:, None]
        if self._written.by_others(cells, own, block).any():
            raise FaultError(f"{what}: reads what another thread writes in the same launch")
        seen, by = self._read.thread[cells], self._read.block[cells]
        self._read.thread[cells] = np.where((seen == NOBODY) | (seen == EARLIER) | (seen == own), own, SEVERAL)
        self._read.block[cells] = np.where((by == NOBODY) | (by == block), block, SEVERAL)
        return _PROCESS[width][_place(address, width, count)]

    def store(self, address: Array, width: int, values: Array, thread: Array, what: str) -> None:
        """Write (n, count) integers."""
        count = values.shape[1]
        cells = self._cells("store", address, width * count, thread, what)
        own, block = thread[:, None], (thread // self._threads)[:, None]
        if self._read.by_others(cells, own, block).any():
            raise FaultError(f"{what}: writes what another thread reads in the same launch")
        memory, place = _PROCESS[width], _place(address, width, count)
        again = self._written.by_others(cells, own, block).reshape(*values.shape, width).any(-1)
        if (again & (memory[place] != values)).any():
            raise FaultError(f"{what}: writes another value than another thread in the same launch")
        memory[place] = values
        self._written.thread[cells], self._written.block[cells] = own, block
        if (memory[place] != values).any():
            raise FaultError(f"{what}: two threads write different values to one address")

    def add(self, address: Array, width: int, values: Array, thread: Array, what: str) -> Array:
        """Atomic addition, in the order of threads; what was there before."""
        cells = self._cells("atomic", address, width, thread, what)
        own, block = thread[:, None], (thread // self._threads)[:, None]
        plain = self._written.by_others(cells, own, block) & (self._written.thread[cells] != ATOMIC)
        if plain.any() or self._read.by_others(cells, own, block).any():
            raise FaultError(f"{what}: adds to what another thread reads or writes in the same launch")
        self._written.thread[cells], self._written.block[cells] = ATOMIC, SEVERAL
        place = _place(address, width, 1)[:, 0]
        return _added(_PROCESS[width], place, values.astype(UINT[8 * width]))


def _added(memory: Array, place: Array, values: Array) -> Array:
    """Add one after the other; what each found."""
    before = np.empty_like(values)
    for i, (at, value) in enumerate(zip(place, values)):
        before[i] = memory[at]
        memory[at] += value
    return before


class Shared:
    """The shared memory of so many blocks, and which warp wrote and read each byte since the last barrier."""

    def __init__(self, blocks: int, size: int) -> None:
        self._bytes = np.full((blocks, size), 0xA5, np.uint8)
        self._written = np.full((blocks, size), NOBODY, np.int32)
        self._read = np.full((blocks, size), NOBODY, np.int32)

    def _places(self, block: Array, address: Array, size: int, what: str) -> tuple[Array, Array]:
        if (address % size).any() or (address + size > self._bytes.shape[1]).any():
            raise FaultError(f"{what}: misaligned or out of bounds in shared memory")
        return block[:, None], address[:, None] + np.arange(size)

    def load(self, block: Array, address: Array, size: int, warp: Array, what: str) -> Array:
        """(n, size) bytes."""
        place, own = self._places(block, address, size, what), warp[:, None]
        written, read = self._written[place], self._read[place]
        if (written == NOBODY).any():
            raise FaultError(f"{what}: reads shared memory that was never written")
        if ((written != EARLIER) & (written != own)).any():
            raise FaultError(f"{what}: reads what another warp wrote, with no barrier between")
        self._read[place] = np.where((read == NOBODY) | (read == own), own, SEVERAL)
        return self._bytes[place]

    def store(self, block: Array, address: Array, data: Array, warp: Array, what: str) -> None:
        """Write (n, size) bytes."""
        place, own = self._places(block, address, data.shape[1], what), warp[:, None]
        written, read = self._written[place], self._read[place]
        foreign = (written != NOBODY) & (written != EARLIER) & (written != own) | (read != NOBODY) & (read != own)
        if foreign.any():
            raise FaultError(f"{what}: writes shared memory that another warp uses, with no barrier between")
        self._bytes[place] = data
        self._written[place] = own
        if (self._bytes[place] != data).any():
            raise FaultError(f"{what}: two threads write different values to one place of shared memory")

    def add(self, block: Array, address: Array, values: Array, warp: Array, what: str) -> Array:
        """Atomic addition; what was there before."""
        size = values.dtype.itemsize
        place = self._places(block, address, size, what)
        written, read, own = self._written[place], self._read[place], warp[:, None]
        if (written == NOBODY).any():
            raise FaultError(f"{what}: adds to shared memory that was never written")
        ordered = (written == EARLIER) | (written == ATOMIC) | (written == own)
        if not ordered.all() or ((read != NOBODY) & (read != own)).any():
            raise FaultError(f"{what}: adds to shared memory that another warp uses, with no barrier between")
        self._written[place] = ATOMIC
        words = self._bytes.view(values.dtype).reshape(-1)
        return _added(words, (block * self._bytes.shape[1] + address) // size, values)

    def barrier(self, blocks: Array) -> None:
        """Orders what the warps of each block did with what they will do."""
        self._written[blocks] = np.where(self._written[blocks] != NOBODY, EARLIER, NOBODY)
        self._read[blocks] = NOBODY
