"""Ahead-of-time compilation of Triton kernels, with no GPU and no driver, and figures read from the machine code."""

from __future__ import annotations

import math
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.amdgcn import Amdgcn
from benchmarks.listing import Counts, Listing
from benchmarks.sass import Sass
from triton_thresh.launch import OPTIONS

TARGETS: dict[str, GPUTarget] = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Unaligned:
    """The type of a pointer or integer argument that 16 does not divide."""

    type: str


@dataclass(frozen=True)
class Report(Counts):
    """One compiled kernel. Its counts are those of the whole listing: tails and slow paths too, each loop once.

    hot counts the path of a full block alone (benchmarks.listing says how it is found): a loop over the tiles of a block as
    often as there are tiles, any other once. loop is the part of it that a loop repeats, if there is one. "Per element" is
    per thread, times the threads of a program, over its elements.
    """

    target: str
    num_warps: int
    elements: int
    registers: int  # of 32 bits, per thread
    scalar_registers: int  # AMD's SGPRs; 0 on NVIDIA
    spilled: int  # NVIDIA: bytes of stack; AMD: vector registers
    shared_bytes: int
    hot: Counts
    loop: Counts | None

    @property
    def spills(self) -> int:
        """0 if nothing was spilled."""
        return self.spilled + self.local_memory

    def per_element(self, count: float) -> float:
        threads: int = TARGETS[self.target].warp_size * self.num_warps
        return count * threads / self.elements

    @property
    def instructions_per_element(self) -> float:
        return self.per_element(self.instructions)

    @property
    def hot_instructions_per_element(self) -> float:
        return self.per_element(self.hot.instructions)

    @property
    def loop_instructions_per_element(self) -> float:
        """NaN where no loop moves global memory."""
        return self.per_element(self.loop.instructions if self.loop else math.nan)

    @property
    def special_functions_per_element(self) -> float:
        return self.per_element(self.hot.special_functions)

    @property
    def hot_bytes_per_element(self) -> float:
        """The bytes that the hot path moves with all lanes active. Where it is not what the op moves, it is not one full tile."""
        return self.per_element(self.hot.global_bits / 8)


def compile_kernel(
    kernel: Any, arguments: Mapping[str, object], target: str, *, num_warps: int, elements: int, tiles: int = 1
) -> Report:
    """Compile a @triton.jit kernel for one of TARGETS, of which one program handles so many elements, in so many passes.

    arguments has an entry for each parameter without a default: a type ("*bf16", "fp32", "i64"), a tuple of such
    entries, or a constant; for a tl.constexpr parameter its value. Types are specialised as a launch does it: pointers
    and integers count as divisible by 16 unless Unaligned or named in do_not_specialize (which does not reach into
    tuples, here as there), and tensors as smaller than 2 GiB, which lets AMD use buffer instructions.
    """
    if not isinstance(kernel, triton.JITFunction):
        raise TypeError(f"{kernel!r} is not a compilable @triton.jit kernel (is TRITON_INTERPRET set?)")
    gpu = TARGETS[target]
    source = _source(kernel, arguments, gpu)
    with TemporaryDirectory(prefix="triton-aot-") as folder, knobs.cache.scope():
        knobs.cache.dir = folder
        compiled = triton.compile(source, target=gpu, options={"num_warps": num_warps, **OPTIONS})
        if gpu.backend == "cuda":
            listing, registers = _read_cubin(compiled.asm["cubin"], Path(folder))
        else:
            listing, registers = _read_amdgcn(compiled.asm["amdgcn"])
    hot, loop = listing.hot()
    if tiles > 1:
        assert loop is not None, f"{kernel.__name__} has no loop over its tiles"
        hot = hot.again(loop, tiles - 1)
    return Report(
        **vars(listing.counts()),
        target=target,
        num_warps=num_warps,
        elements=elements,
        registers=registers.vector,
        scalar_registers=registers.scalar,
        spilled=registers.spilled,
        shared_bytes=compiled.metadata.shared,
        hot=hot,
        loop=loop,
    )


def _source(kernel: Any, arguments: Mapping[str, object], gpu: GPUTarget) -> ASTSource:
    """The kernel, its signature ("constexpr" for constants) and, by path into that, its constants and attributes."""
    given = {parameter.name: parameter.default for parameter in kernel.params if parameter.has_default} | dict(
        arguments
    )
    if differing := given.keys() ^ set(kernel.arg_names):
        raise ValueError(f"{kernel.__name__}({', '.join(kernel.arg_names)}): missing or unknown {sorted(differing)}")
    constants: dict[tuple[int, ...], object] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}

    def describe(entry: object, path: tuple[int, ...], aligned: bool) -> object:
        if isinstance(entry, tuple):
            return tuple(describe(part, (*path, place), True) for place, part in enumerate(entry))
        if isinstance(entry, Unaligned):
            return describe(entry.type, path, False)
        if not isinstance(entry, str):
            constants[path] = entry
            return "constexpr"
        pointer = entry.startswith("*")
        if aligned and (pointer or re.fullmatch(r"[iu]\d\d+", entry)):
            attributes[path] = [["tt.divisibility", 16]]
        if pointer and gpu.backend == "hip":
            attributes.setdefault(path, []).append(["tt.pointer_range", 32])
        return entry

    signature: dict[str, object] = {}
    for parameter in kernel.params:
        entry, path = given[parameter.name], (parameter.num,)
        if parameter.is_constexpr:
            constants[path] = entry
            signature[parameter.name] = "constexpr"
        else:
            signature[parameter.name] = describe(entry, path, not parameter.do_not_specialize)
    return ASTSource(kernel, signature, constants, attributes)


class _Registers(NamedTuple):
    vector: int
    scalar: int
    spilled: int


def _read_cubin(cubin: bytes, folder: Path) -> tuple[Listing, _Registers]:
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    listing = Sass.parse(_output(knobs.nvidia.nvdisasm.path, "-c", "-ndf", file))  # no data flow: the same text, sooner
    usage = _output(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file)
    used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    return listing, _Registers(used["REG"], 0, used["STACK"])


def _read_amdgcn(text: str) -> tuple[Listing, _Registers]:
    used = {name: int(value) for name, value in re.findall(r"\.([vs]gpr\w*_count): +(\d+)", text)}
    return Amdgcn.parse(text), _Registers(used["vgpr_count"], used["sgpr_count"], used["vgpr_spill_count"])


def _output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
