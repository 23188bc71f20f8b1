"""Launches kernels: operands as kernels take them, and a launch cache. Nothing here knows an op, or autograd."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import layout
from .backend import interpreting, on_device
from .checks import Operand

NUMBER, SCALAR, CHANNEL, ELEMENT = range(4)  # the kinds of operands, as kernels/operand.py describes them
SHORT = frozenset({torch.float16, torch.bfloat16, torch.float32})  # which a float32 holds
# A product and a sum are one instruction where kernels/ says tl.fma, and nowhere else. A compiler that may join them joins others
# in each kernel, so that a loss would have another last bit with its gradient than without.
OPTIONS = {"enable_fp_fusion": False, "num_stages": 1}


@functools.cache
def device_code(module: str) -> ModuleType:
    """A module of kernels/. It is imported when a kernel is first needed, because it imports Triton."""
    return importlib.import_module(f".kernels.{module}", __package__)


@functools.cache
def triton_dtype(dtype: torch.dtype) -> Any:
    """Triton's name of a dtype."""
    import triton.language as tl

    return getattr(tl, str(dtype).removeprefix("torch."))


# -------------------------------------------------------------------------------------------------------------- operands


def pack(value: Operand, input: Tensor, dtype: torch.dtype) -> tuple[tuple[Any, ...], int]:
    """An operand as kernels take it, and its kind; a number is held in `dtype`.

    A number travels as a float32 argument if that holds it, else as a 0-dim tensor on the device.
    """
    if not isinstance(value, Tensor):
        if dtype in SHORT:
            return (float(value),), NUMBER
        return (torch.full((), value, dtype=dtype, device=input.device),), SCALAR
    if value.numel() == 1:
        if value.device != input.device:  # read on the CPU and filled in on the device: a copy would make the host wait
            value = torch.full((), value.item(), dtype=value.dtype, device=input.device)
        return (value,), SCALAR
    shape, stride = input.shape, input.stride()
    pattern = layout.broadcast_pattern(shape, stride, value.shape)
    if pattern is not None:
        inner, mid = pattern
        if inner == 1 and mid == input.numel():
            if value.is_contiguous() and input.is_contiguous():
                return (value,), ELEMENT
            return (layout.laid_out_as(value.reshape(shape), shape, stride),), ELEMENT
        return (layout.block(value, input), inner, mid), CHANNEL
    laid = torch.empty_strided(shape, stride, dtype=value.dtype, device=input.device)
    return (laid.copy_(value.detach()),), ELEMENT


Packed = tuple[tuple[tuple[Any, ...], ...], tuple[int, ...]]


def pack_all(values: Sequence[Operand], input: Tensor, dtypes: Sequence[torch.dtype]) -> Packed:
    """Several operands, and the tuple of their kinds."""
    packed = [pack(value, input, dtype) for value, dtype in zip(values, dtypes)]
    return tuple([p for p, _ in packed]), tuple([kind for _, kind in packed])


# -------------------------------------------------------------------------------------------------------------- launches


@functools.cache
def _driver() -> Any:
    from triton.runtime import driver

    return driver


@functools.cache
def _hooks() -> Any:
    from triton import knobs

    return knobs.runtime


@functools.cache
def _is_nvidia(device: int) -> bool:
    """True if Triton's binder looks at no more than `_facts` does. For AMD's GPUs it looks at storages too."""
    return bool(_driver().active.get_current_target().backend == "cuda")


@functools.lru_cache(maxsize=4096)
def _facts_of_integer(value: int) -> tuple[bool, ...]:
    return value % 16 == 0, value == 1, value.bit_length() > 31


def _facts(arguments: tuple[Any, ...], *before: int) -> tuple[Any, ...]:
    """The facts of run-time arguments that Triton compiles for: dtype and alignment of a tensor, some facts about an integer.

    A tuple argument holds the packed operands, which are tuples themselves. The result starts with the values in `before`.
    """
    facts: list[Any] = [*before]
    for value in arguments:
        kind = type(value)
        if kind is float or value is None:
            facts.append(kind)
        elif kind is int:
            facts.append(_facts_of_integer(value))
        elif kind is tuple:
            for packed in value:
                facts.append(float if type(packed[0]) is float else _facts(packed))
        else:
            facts.append(value.dtype if value.data_ptr() % 16 == 0 else (value.dtype,))
    return tuple(facts)


def blocks(length: int, block: int) -> int:
    """How many blocks a length falls into, the last one perhaps not full."""
    return -(-length // block)


class Kernel:
    """A ``@triton.jit`` function together with its constexpr arguments.

    The function must declare them last, in this order, directly after `operands` if it has any. Triton analyses every argument at
    each ``kernel[grid](...)``; after the first launch for a combination of dtypes and alignments the compiled kernel is called
    directly, which halves the host's time (hardshrink: 15.8 to 8.7 µs).
    """

    __slots__ = ("_compiled", "_constants", "_function", "_interpreted", "_looked_at", "_num_warps")

    def __init__(self, function: Any, *, num_warps: int, **constants: Any) -> None:
        self._function, self._num_warps, self._interpreted = function, num_warps, interpreting()
        self._constants = tuple(constants.values())
        assert tuple(constants) == tuple(function.arg_names[-len(constants) :])
        numbers = "KINDS" in constants and set(constants["KINDS"]) <= {NUMBER}  # all of them are bound alike
        assert not numbers or function.arg_names[-len(constants) - 1] == "operands"
        self._looked_at = slice(-1 if numbers else None)
        self._compiled: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def __call__(self, programs: int, *arguments: Any) -> None:
        """Launch so many programs, on the device of the first argument, a tensor."""
        if self._interpreted:
            self._launch(programs, arguments)
            return
        active = _driver().active
        device, own = active.get_current_device(), arguments[0].get_device()
        if own != device and own >= 0:
            with on_device(arguments[0].device):
                self(programs, *arguments)
            return
        key = _facts(arguments[self._looked_at], device)
        found = self._compiled.get(key)
        if found is None:
            compiled = self._launch(programs, arguments)
            if _is_nvidia(device):
                described = compiled.function, compiled.packed_metadata, None, None, None  # for no hook
                self._compiled[key] = compiled, compiled.run, described
        elif _is_profiled():
            found[0][(programs, 1, 1)](*arguments, *self._constants)
        else:
            _, run, described = found
            run(programs, 1, 1, active.get_current_stream(device), *described, *arguments, *self._constants)

    def _launch(self, programs: int, arguments: tuple[Any, ...]) -> Any:
        return self._function[(programs,)](*arguments, *self._constants, num_warps=self._num_warps, **OPTIONS)


def _is_profiled() -> bool:
    """True if a profiler has hooks on launches, for which Triton then describes them; empty ones cost a microsecond."""
    hooks = _hooks()
    enter, leave = hooks.launch_enter_hook, hooks.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
