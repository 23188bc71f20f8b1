"""The text of a kernel in PTX, as blocks of instructions. What is written in a way not known here raises UnsupportedError."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

from .values import WIDTH

ENDS = ("bra", "ret", "exit")


class UnsupportedError(NotImplementedError):
    """An instruction, modifier or operand whose meaning is not written down here."""


@dataclass(frozen=True)
class Instruction:
    """An instruction: its name, what stands after that between dots, its operands, and its guard (register, negated)."""

    text: str
    name: str
    parts: tuple[str, ...]
    operands: tuple[str, ...]
    guard: tuple[str, bool] | None

    @property
    def type(self) -> str:
        """The type, which stands last."""
        return self.parts[-1]

    def modifiers(self, *known: str) -> frozenset[str]:
        """What stands before the type, if all of it is known."""
        found = frozenset(self.parts[:-1])
        if found - set(known):
            raise UnsupportedError(self.text)
        return found


@dataclass(frozen=True)
class Parameter:
    """A parameter of a kernel: its type, and where it lies among the others."""

    name: str
    type: str
    offset: int


class Program:
    """A parsed entry point: threads of a block, parameters, widths of registers by their prefix, blocks of instructions."""

    def __init__(self, text: str) -> None:
        text = re.sub(r"//[^\n]*|^\s*\.loc[^\n]*$", "", text.partition("\n\t.section")[0], flags=re.M)
        head = re.search(r"\.visible \.entry (\w+)\((.*?)\)\s*((?:\.\w+ [^\n]*\s*)*)\{\n", text, re.S)
        if not head or re.search(r"^\s*\.shared", text, re.M):
            raise UnsupportedError("no entry point, or static shared memory")
        self.name, parameters, directives = head.groups()
        threads = re.search(r"\.(?:reqntid|maxntid) (\d+)", directives)
        if not threads:
            raise UnsupportedError("a block of any size")
        self.threads = int(threads[1])
        self.parameters: list[Parameter] = []
        end = 0
        for type, name in re.findall(r"\.param \.(\w+)[^,]*?(\w+)(?:,|\s*$)", parameters):
            size = WIDTH[type] // 8
            self.parameters.append(Parameter(name, type, -(-end // size) * size))
            end = self.parameters[-1].offset + size
        self.parameter_bytes = end
        self.symbols = dict.fromkeys(re.findall(r"\.extern \.shared[^;]*?(\w+)\[\]", text), 0)
        self.widths: dict[str, int] = {}
        self.labels: dict[str, int] = {}
        self.blocks: list[list[Instruction]] = [[]]
        depths = itertools.accumulate(({"{": 1, "}": -1}.get(c, 0) for c in text[head.end() :]), initial=1)
        length = next(place for place, depth in enumerate(depths) if depth == 0) - 1
        self._read(text[head.end() : head.end() + length])

    def _read(self, body: str) -> None:
        scopes: list[list[str]] = []  # the registers of each scope that is open
        for line in map(str.strip, body.split("\n")):
            if label := re.match(r"(\$?\w+):", line):
                self.blocks.append([])
                self.labels[label[1]] = len(self.blocks) - 1
                line = line[label.end() :].strip()
            if line.startswith(".pragma"):
                continue
            for statement in map(str.strip, line.split(";")):
                if statement.startswith("{"):
                    scopes.append([])
                    statement = statement[1:].strip()
                if statement == "}":
                    scopes.pop()
                elif statement.startswith(".reg"):
                    self._declare(statement, scopes)
                elif statement and not statement.startswith("."):
                    for own in itertools.chain(*scopes):
                        statement = re.sub(rf"(?<![%\w.])({own}\d*)\b(?!\.)", r"%scoped\1", statement)
                    self.blocks[-1].append(_instruction(statement))
                    if self.blocks[-1][-1].name in ENDS:
                        self.blocks.append([])

    def _declare(self, statement: str, scopes: list[list[str]]) -> None:
        found = re.fullmatch(r"\.reg \.(\w+)\s+(%?[a-z]+)(?:<\d+>)?", statement)
        if not found:
            raise UnsupportedError(statement)
        if scopes:
            scopes[-1].append(found[2])
        self.widths[f"%scoped{found[2]}" if scopes else found[2]] = WIDTH[found[1]]

    def width(self, register: str) -> int:
        found = re.match(r"%[a-z]+", register)
        if not found or found[0] not in self.widths:
            raise UnsupportedError(f"register {register}")
        return self.widths[found[0]]


def _instruction(statement: str) -> Instruction:
    found = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([\w.:]+)\s*(.*)", statement, re.S)
    if not found:
        raise UnsupportedError(statement)
    name, *parts = found[3].split(".")
    operands = [o.strip() for o in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", found[4])]
    return Instruction(
        statement, name, tuple(parts), tuple(operands), (found[2], found[1] == "!") if found[2] else None
    )


def registers(operand: str) -> list[str]:
    """The parts of a vector, or the one register."""
    return [part.strip() for part in operand.strip("{}").split(",")]


def address(operand: str) -> tuple[str, int]:
    """The base of an address, and the offset from it."""
    found = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
    if not found:
        raise UnsupportedError(f"address {operand}")
    return found[1], int(found[2] or 0)
