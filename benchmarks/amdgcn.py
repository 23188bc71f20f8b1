"""AMD machine code, as LLVM's assembler lists it."""

from __future__ import annotations

import operator
import re
from collections import defaultdict
from collections.abc import Callable, Mapping

from benchmarks.listing import Instruction, Listing, State

_LINE = re.compile(r"\s+((?:s|v|ds|global|buffer|flat|scratch)_\w+)\s*([^;]*)")
_LABEL = re.compile(r"(\.L\w+):")
_END = ".Lfunc_end"
_KINDS = {
    "special_functions": re.compile(r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_"),
    "shuffles": re.compile(r"ds_(swizzle|permute|bpermute)|v_permlane|v_\w+_dpp$"),
    "barriers": re.compile(r"s_barrier"),
    "atomics": re.compile(r"(global|buffer|flat)_atomic"),
    "local_memory": re.compile(r"scratch_(load|store)"),
}
_ACCESS = re.compile(r"(?:global|buffer|flat)_(load|store)_[us]?(byte|short|dword)(?:x(\d))?")
_WIDTHS = {"byte": 8, "short": 16, "dword": 32}

# LLVM lets two exclusive blocks follow each other, the second behind a flag that the first has cleared. So constants in
# scalar registers are followed along a path, and decide its branches. exec is all ones: every lane is active.
_CONSTANT = re.compile(r"s_(mov|and|andn2|or|xor|cselect|cmp_lg|cmp_eq)_[biu](?:32|64)")
_OPERATIONS: dict[str, Callable[..., int]] = {
    "mov": lambda a: a,
    "and": operator.and_,
    "andn2": lambda a, b: a & ~b,
    "or": operator.or_,
    "xor": operator.xor,
    "cselect": lambda a, b, scc: a if scc else b,
    "cmp_lg": operator.ne,
    "cmp_eq": operator.eq,
}
_KEEPS_SCC = re.compile(r"s_(mov|cselect|load|waitcnt|nop|branch|cbranch)_?")
_CONDITIONS = {
    "s_cbranch_scc0": ("scc", False),
    "s_cbranch_scc1": ("scc", True),
    "s_cbranch_vccz": ("vcc", False),
    "s_cbranch_vccnz": ("vcc", True),
    "s_cbranch_execz": ("exec", False),
    "s_cbranch_execnz": ("exec", True),
}

Known = frozenset[tuple[str, int]]  # scalar register, the constant it holds


class Amdgcn(Listing):
    start = State(0, Known())

    def __init__(self, instructions: list[Instruction], labels: dict[str, int]) -> None:
        super().__init__(instructions, labels)
        self._changing: dict[int, set[str]] = defaultdict(set)  # by first instruction of a loop: what the loop writes
        for at, (opcode, operands, _) in enumerate(instructions):
            if (opcode in _CONDITIONS or opcode == "s_branch") and labels[operands] <= at:
                for inside in instructions[labels[operands] : at]:
                    self._changing[labels[operands]] |= _written(inside)

    @classmethod
    def parse(cls, text: str) -> Amdgcn:
        instructions: list[Instruction] = []
        labels: dict[str, int] = {}
        for line in text.splitlines():
            if label := _LABEL.match(line):
                if label[1].startswith(_END):
                    break
                labels[label[1]] = len(instructions)
            elif code := _LINE.match(line):
                instructions.append(Instruction(code[1], code[2].strip()))
        return cls(instructions, labels)

    def kind(self, opcode: str) -> str | None:
        return next((kind for kind, pattern in _KINDS.items() if pattern.match(opcode)), None)

    def access(self, opcode: str) -> tuple[str, int] | None:
        found = _ACCESS.match(opcode)
        return (found[1], _WIDTHS[found[2]] * int(found[3] or 1)) if found else None

    def successors(self, state: State) -> list[State]:
        instruction = self.instructions[state.at]
        opcode, operands, _ = instruction
        assert isinstance(state.past, frozenset)
        known = _without(dict(state.past), self._changing.get(state.at, set()))
        if opcode == "s_endpgm":
            return []
        if opcode.startswith(("s_setpc", "s_swappc", "s_call")):
            raise NotImplementedError(f"indirect jump: {opcode} {operands}")
        if opcode == "s_branch":
            return [State(self.labels[operands], frozenset(known.items()))]
        after = State(state.at + 1, frozenset(_after(instruction, known).items()))
        if opcode not in _CONDITIONS:
            return [after]
        jump = after._replace(at=self.labels[operands])
        register, wanted = _CONDITIONS[opcode]
        if opcode == "s_cbranch_execnz" and self.instructions[state.at - 1].operands.startswith("exec"):
            return [after, jump]  # a loop whose lanes leave one by one
        value = _value(register, known)
        return [after, jump] if value is None else [jump] if bool(value) == wanted else [after]


def _after(instruction: Instruction, known: Mapping[str, int]) -> dict[str, int]:
    """The constants held after an instruction that meets those known."""
    held = _without(known, _written(instruction))
    if operation := _CONSTANT.fullmatch(instruction.opcode):
        name = operation[1]
        sources = instruction.operands.split(", ")
        destination = "scc" if name.startswith("cmp") else sources.pop(0)
        values = [_value(source, known) for source in (*sources, *["scc"] * (name == "cselect"))]
        if None not in values:
            held[destination] = _OPERATIONS[name](*values)
            if name in ("and", "andn2", "or", "xor"):
                held["scc"] = held[destination] != 0
    return held


def _value(operand: str, known: Mapping[str, int]) -> int | None:
    if operand == "exec":
        return -1
    if re.fullmatch(r"-?\d+|0x[0-9a-f]+", operand):
        return int(operand, 0)
    return known.get(operand)


def _without(known: Mapping[str, int], written: set[str]) -> dict[str, int]:
    return {register: value for register, value in known.items() if not _parts(register) & written}


def _written(instruction: Instruction) -> set[str]:
    """The scalar registers an instruction writes, or may write."""
    opcode, operands, _ = instruction
    first, second = [*operands.split(", "), ""][:2]
    written = _parts(first) | (_parts(second) if opcode.startswith("v_") else set())
    return written | {"scc"} if opcode.startswith("s_") and not _KEEPS_SCC.match(opcode) else written


def _parts(register: str) -> set[str]:
    if pair := re.fullmatch(r"s\[(\d+):(\d+)\]", register):
        return {f"s{number}" for number in range(int(pair[1]), int(pair[2]) + 1)}
    return {register.removesuffix("_lo").removesuffix("_hi")}
