"""NVIDIA machine code, as `nvdisasm -c` lists it."""

from __future__ import annotations

import re
from typing import NamedTuple

from benchmarks.listing import Instruction, Listing, State

_LINE = re.compile(
    r"/\*[0-9a-f]{4,}\*/\s+(@!?\w+\s+)?([\w.]+)\s*(.*?)\s*(?:\?\w+\s*)?;"
)  # sm_120 ends some with ?trans5
_LABEL = re.compile(r"([.$\w]+):")
_TARGET = re.compile(r"`\(([^)]+)\)")
_KINDS = {
    "MUFU": "special_functions",
    "SHFL": "shuffles",
    "REDUX": "shuffles",
    "CREDUX": "shuffles",
    "BAR": "barriers",
    "ATOM": "atomics",
    "ATOMG": "atomics",
    "ATOMS": "atomics",
    "RED": "atomics",
    "REDG": "atomics",
    "LDL": "local_memory",
    "STL": "local_memory",
}
_ACCESSES = {"LD": "load", "LDG": "load", "LDGSTS": "load", "ST": "store", "STG": "store"}
_WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}


class Past(NamedTuple):
    resume: frozenset[tuple[str, int]] = frozenset()  # convergence barrier -> where BSYNC goes on
    calls: tuple[int, ...] = ()  # where the open calls return to


class Sass(Listing):
    start = State(0, Past())

    @classmethod
    def parse(cls, text: str) -> Sass:
        instructions: list[Instruction] = []
        labels: dict[str, int] = {}
        for line in text.splitlines():
            if label := _LABEL.match(line):
                labels[label[1]] = len(instructions)
            elif code := _LINE.search(line):
                instructions.append(Instruction(code[2], code[3], guarded=code[1] is not None))
        while instructions and instructions[-1].opcode == "NOP":  # after the end: a branch to itself, NOPs to 128 bytes
            instructions.pop()
        if instructions and instructions[-1].opcode == "BRA":
            instructions.pop()
        return cls(instructions, labels)

    def kind(self, opcode: str) -> str | None:
        return _KINDS.get(opcode.partition(".")[0])

    def access(self, opcode: str) -> tuple[str, int] | None:
        name, *modifiers = opcode.split(".")
        if name not in _ACCESSES:
            return None
        return _ACCESSES[name], next((_WIDTHS[modifier] for modifier in modifiers if modifier in _WIDTHS), 32)

    def successors(self, state: State) -> list[State]:
        opcode, operands, guarded = self.instructions[state.at]
        name, *modifiers = opcode.split(".")
        past = state.past
        assert isinstance(past, Past)
        after = state._replace(at=state.at + 1)
        resume = dict(past.resume)
        barrier = operands.split(",")[0]
        conditional = guarded
        jump: list[State] = []
        if name == "BSSY":
            resume[barrier] = self._target(operands)
            return [after._replace(past=past._replace(resume=frozenset(resume.items())))]
        if name == "BRA" and "DIV" not in modifiers:  # BRA.DIV is for lanes that have come apart
            conditional = guarded or not operands.startswith("`")  # BRA.U !UP0, `(label)
            jump = [state._replace(at=self._target(operands))]
        elif name == "BSYNC":
            at = resume.pop(barrier)
            jump = [State(at, past._replace(resume=frozenset(resume.items())))]
        elif name == "CALL":
            jump = [State(self._target(operands), past._replace(calls=(*past.calls, after.at)))]
        elif name == "RET":
            jump = [State(past.calls[-1], past._replace(calls=past.calls[:-1]))]
        elif name in ("BRX", "BRXU", "JMP", "JMX", "JMXU"):
            raise NotImplementedError(f"indirect jump: {opcode} {operands}")
        elif name == "EXIT":
            if guarded and self._is_wide_after(state.at):  # leaves the lanes that are done; a warp with work goes on
                return [after]
            conditional = guarded  # or the program, which has no tail
            jump = [state._replace(at=self.end)]
        else:
            return [after]
        return jump + [after] * conditional

    def _is_wide_after(self, at: int) -> bool:
        accesses = [self.access(instruction.opcode) for instruction in self.instructions[at:]]
        return any(access[1] >= 128 for access in accesses if access)

    def _target(self, operands: str) -> int:
        label = _TARGET.search(operands)
        if not label or label[1] not in self.labels:
            raise NotImplementedError(f"jump out of the kernel: {operands}")
        return self.labels[label[1]]
