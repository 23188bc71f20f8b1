"""The instruction listing of a compiled kernel: what it holds, in whole and on the path of a full tile."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from benchmarks import paths


@dataclass(frozen=True)
class Counts:
    """How many there are of each. load_bits and store_bits: of global accesses, by their width in bits."""

    instructions: int
    special_functions: int
    shuffles: int
    barriers: int
    atomics: int
    local_memory: int
    load_bits: Counter[int]
    store_bits: Counter[int]

    def again(self, loop: Counts, times: int) -> Counts:
        """The same with so many more passes through a loop."""
        found: dict[str, Any] = {}
        for name, mine in vars(self).items():
            other = vars(loop)[name]
            if isinstance(mine, Counter):
                found[name] = mine + Counter({width: times * count for width, count in other.items()})
            else:
                found[name] = mine + times * other
        return Counts(**found)

    @property
    def global_bits(self) -> int:
        return sum(width * times for width, times in (*self.load_bits.items(), *self.store_bits.items()))


class Instruction(NamedTuple):
    opcode: str
    operands: str
    guarded: bool = False  # runs under a predicate


class State(NamedTuple):
    """Which instruction comes next, and what of the past decides where branches go."""

    at: int
    past: Hashable


class Listing(ABC):
    start: State

    def __init__(self, instructions: list[Instruction], labels: dict[str, int]) -> None:
        self.instructions = instructions
        self.labels = labels
        self.end = len(instructions)

    @abstractmethod
    def kind(self, opcode: str) -> str | None:
        """The field of Counts for the opcode, if it is none of the global accesses."""

    @abstractmethod
    def access(self, opcode: str) -> tuple[str, int] | None:
        """("load" or "store", width in bits) of a global memory access."""

    @abstractmethod
    def successors(self, state: State) -> list[State]:
        """Where a warp may be after the next instruction, its lanes together; past the last instruction at an exit."""

    def counts(self) -> Counts:
        return self._count(range(self.end))

    def hot(self) -> tuple[Counts, Counts | None]:
        """Counts on the hot path, and on the part of it in the loop that moves the most, if one moves anything.

        The hot path goes through each loop once. It is the shortest of those from entry to exit whose memory accesses
        are nearer in weight to the heaviest path's than to the lightest's, where an access weighs its width squared. It
        is the full tile, not a tail with its narrow accesses (some of which a full tile shares between elements), nor a
        way round the work.
        """
        graph = paths.reachable(self.start, lambda state: self.successors(state) if state.at < self.end else [])
        loops = paths.loops(graph, self.start)
        path = paths.shortest_heavy(paths.unrolled_once(graph, loops), self.start, self._weight)
        places = ({state.at for state in loop} for loop in loops.values())  # the first pass may come with another past
        parts = (self._count(state.at for state in path if state.at in held) for held in places)
        loop = max(parts, key=lambda part: (part.global_bits, -part.instructions), default=None)
        return self._count(state.at for state in path), loop if loop and loop.global_bits else None

    def _weight(self, state: State) -> int:
        access = self.access(self.instructions[state.at].opcode) if state.at < self.end else None
        return access[1] ** 2 if access else 0

    def _count(self, places: Iterable[int]) -> Counts:
        opcodes = [self.instructions[at].opcode for at in places if at < self.end]
        kinds = Counter(map(self.kind, opcodes))
        accesses = Counter(filter(None, map(self.access, opcodes)))
        return Counts(
            instructions=len(opcodes),
            special_functions=kinds["special_functions"],
            shuffles=kinds["shuffles"],
            barriers=kinds["barriers"],
            atomics=kinds["atomics"],
            local_memory=kinds["local_memory"],
            load_bits=Counter({width: times for (way, width), times in accesses.items() if way == "load"}),
            store_bits=Counter({width: times for (way, width), times in accesses.items() if way == "store"}),
        )
