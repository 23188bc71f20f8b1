"""Runs a kernel: all threads of a launch in lockstep, as numpy vectors, with a mask where they diverge.

Registers hold bits. Of the blocks of instructions at which threads wait, the first in the text runs next, so that threads meet
again after branches and loops.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .approximation import Approximation
from .memory import FaultError, Global, Shared
from .parse import ENDS, Instruction, Program, UnsupportedError
from .values import INT, UINT, WIDTH, Array, decode, encode, is_pair

WARP = 32
AT_ONCE = 1 << 15  # threads
UNDEFINED = 0xDEADBEEFDEADBEEF

Mask = Any  # of threads; None for all of them
Run = Callable[["State", Mask], None]
Read = Callable[["State"], Array]
Write = Callable[["State", Array, Mask], None]


class State:
    """Blocks of threads in flight."""

    def __init__(self, kernel: Kernel, blocks: Array, grid: Sequence[int], arguments: bytes, memory: Global) -> None:
        self.threads = kernel.program.threads
        self.count = len(blocks) * self.threads
        self.arguments, self.memory, self.blocks = arguments, memory, blocks.astype(np.int32)
        self.shared = Shared(len(blocks), kernel.shared)
        self.registers: dict[str, Array] = {}
        self.live = np.ones(self.count, bool)
        self._dtype = kernel.dtype
        tid = np.tile(np.arange(self.threads, dtype=np.uint32), len(blocks))
        own = np.repeat(blocks.astype(np.uint32), self.threads)
        self.block = np.repeat(np.arange(len(blocks)), self.threads)  # among those in flight
        self.lane = (tid % WARP).astype(np.int64)
        self.warp = (tid // WARP).astype(np.int32)
        self.thread = (own.astype(np.int64) * self.threads + tid).astype(np.int32)
        x, y, z = map(np.uint32, grid)
        one = np.ones(self.count, np.uint32)
        self.special = {
            "%tid.x": tid,
            "%ctaid.x": own % x,
            "%ctaid.y": own // x % y,
            "%ctaid.z": own // (x * y),
            "%nctaid.x": one * x,
            "%nctaid.y": one * y,
            "%nctaid.z": one * z,
            "%laneid": tid % np.uint32(WARP),
        }

    def get(self, register: str) -> Array:
        """The bits of a register. LLVM leaves those unwritten whose value does not matter; they hold a pattern here."""
        found = self.registers.get(register)
        if found is None:
            dtype = self._dtype(register)
            found = np.full(self.count, True if dtype == np.bool_ else UNDEFINED & np.iinfo(dtype).max, dtype)
        return found

    def put(self, register: str, bits: Array, mask: Mask) -> None:
        if register == "_":
            return
        if bits.shape != (self.count,):
            bits = np.broadcast_to(bits, (self.count,))
        if bits.dtype != self._dtype(register):
            raise UnsupportedError(f"{bits.dtype} into {register}")
        self.registers[register] = bits if mask is None else np.where(mask, bits, self.get(register))


class Kernel:
    """A kernel that can be launched: what each instruction does is settled when it is made."""

    def __init__(self, text: str, shared: int, approximate: Approximation | None = None) -> None:
        from .instructions import meaning

        self.program, self.shared = Program(text), -(-shared // 16) * 16
        self.approximate = approximate or Approximation()
        self._dtypes: dict[str, Any] = {}
        self._blocks = [
            [(i, None if i.name in ENDS else self._guarded(i, meaning(self, i))) for i in block]
            for block in self.program.blocks
        ]

    @staticmethod
    def _guarded(instruction: Instruction, run: Run) -> Run:
        if instruction.guard is None:
            return run
        register, negated = instruction.guard

        def guarded(state: State, mask: Mask) -> None:
            on = state.get(register) ^ negated
            on = on if mask is None else on & mask
            if on.all():
                run(state, None)
            elif on.any():
                run(state, on)

        return guarded

    def launch(self, grid: Sequence[int], arguments: Sequence[Any], memory: Global) -> int:
        """Run all blocks of a grid; how many instructions its threads executed."""
        packed, executed = self._packed(arguments), 0
        blocks, step = np.arange(grid[0] * grid[1] * grid[2]), max(1, AT_ONCE // self.program.threads)
        with np.errstate(all="ignore"):
            for start in range(0, len(blocks), step):
                executed += self._run(State(self, blocks[start : start + step], grid, packed, memory))
        return executed

    def _packed(self, arguments: Sequence[Any]) -> bytes:
        """Parameters as they lie in memory: pointers and integers as int, floats as float. Those of Triton's own are 0."""
        parameters = self.program.parameters
        formats = {"b": "BHIQ", "u": "BHIQ", "s": "bhiq"}
        packed = bytearray(self.program.parameter_bytes)
        for value, parameter in zip(arguments, parameters):
            type = parameter.type
            if type in ("f32", "f64"):
                struct.pack_into("<" + {"f32": "f", "f64": "d"}[type], packed, parameter.offset, value)
                continue
            form = formats[type[0]][WIDTH[type].bit_length() - 4]
            wrapped = int(value) & ((1 << WIDTH[type]) - 1) if type[0] != "s" else int(value)
            struct.pack_into("<" + form, packed, parameter.offset, wrapped)
        return bytes(packed)

    def _run(self, state: State) -> int:
        waiting, executed = {0: np.ones(state.count, bool)}, 0

        def arrive(block: int, mask: Array) -> None:
            waiting[block] = waiting[block] | mask if block in waiting else mask

        while waiting:
            at = min(waiting)
            here = waiting.pop(at)
            mask = None if here.all() else here
            executed += int(here.sum()) * len(self._blocks[at])
            for instruction, run in self._blocks[at]:
                if run is not None:
                    run(state, mask)
                    continue
                taken = here
                if instruction.guard:
                    register, negated = instruction.guard
                    taken = here & (state.get(register) ^ negated)
                if instruction.name == "bra":
                    if taken.any():
                        arrive(self.program.labels[instruction.operands[0]], taken)
                else:
                    state.live &= ~taken
                here = here & ~taken
            if here.any():
                if at + 1 == len(self._blocks):
                    raise FaultError("runs past the end")
                arrive(at + 1, here)
        return executed

    # ------------------------------------------------------------------------------------------------------------ operands

    def dtype(self, register: str) -> Any:
        """The numpy type of a register's bits."""
        found = self._dtypes.get(register)
        if found is None:
            found = self._dtypes[register] = UINT[self.program.width(register)]
        return found

    def bits(self, operand: str, width: int) -> Read:
        """What reads an operand as bits of a width; a wider register is cut."""
        if operand.startswith("%"):
            if "." in operand or operand == "%laneid":
                if width != 32:
                    raise UnsupportedError(operand)
                return lambda state: state.special[operand]
            own = self.program.width(operand)
            if own == width:
                return lambda state: state.get(operand)
            if own < width or width == 1:
                raise UnsupportedError(f"{operand} read as {width} bits")
            return lambda state: state.get(operand).astype(UINT[width])
        constant = np.array([self._constant(operand, width)], UINT[width])
        return lambda state: constant

    def _constant(self, operand: str, width: int) -> int:
        if found := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", operand):
            return int(found[1] or found[2], 16)
        if operand in self.program.symbols:
            return self.program.symbols[operand]
        if found := re.fullmatch(r"(-?)(0[xX][0-9a-fA-F]+|\d+)U?", operand):
            return (-1 if found[1] else 1) * int(found[2], 0) & ((1 << width) - 1)
        raise UnsupportedError(f"operand {operand}")

    def values(self, operand: str, type: str) -> Read:
        """What reads an operand as values of a type."""
        read = self.bits(operand, WIDTH[type])
        if type == "pred" or (type[0] in "ub" and type != "bf16" and not is_pair(type)):
            return read
        return lambda state: decode(read(state), type)

    def writer(self, register: str, type: str) -> Write:
        """What writes values of a type into a register at least as wide, extended by their sign if they have one."""
        if register == "_":
            return lambda state, values, mask: None
        own = self.program.width(register)
        if own == WIDTH[type]:
            return lambda state, values, mask: state.put(register, encode(values, type), mask)
        if own < WIDTH[type] or type[0] not in "usb" or type in ("bf16", "bf16x2"):
            raise UnsupportedError(f"{type} into {register}")
        wide = (INT if type[0] == "s" else UINT)[own]
        return lambda state, values, mask: state.put(
            register, decode(encode(values, type), type).astype(wide).view(UINT[own]), mask
        )
