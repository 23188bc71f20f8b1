"""Launches kernels: past Triton's binder where such arguments have been bound before."""

from __future__ import annotations

import functools
from typing import Any

from triton import knobs
from triton.runtime import driver

from .backend import interpreting, on_device
from .kernels import operand

NUMBER: int = operand.NUMBER.value
OPTIONS = {"enable_fp_fusion": True, "num_stages": 1}


@functools.cache
def _is_nvidia(device: int) -> bool:
    """Whether what `_bound` looks at is all that Triton's binder does: for AMD's GPUs it looks at storages too."""
    return bool(driver.active.get_current_target().backend == "cuda")


def _is_watched() -> bool:
    """Whether a profiler has hooks on launches, for which Triton then describes them; empty ones cost a microsecond."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


@functools.lru_cache(maxsize=4096)
def _of_integer(value: int) -> tuple[bool, ...]:
    return value % 16 == 0, value == 1, value.bit_length() > 31


def _bound(arguments: tuple[Any, ...], *before: int) -> tuple[Any, ...]:
    """What Triton compiles for in run-time arguments: dtype and alignment of a tensor, some facts about an integer.

    A tuple among them is one of packed operands, each a tuple. The facts stand after those given.
    """
    facts: list[Any] = [*before]
    for value in arguments:
        kind = type(value)
        if kind is float or value is None:
            facts.append(kind)
        elif kind is int:
            facts.append(_of_integer(value))
        elif kind is tuple:
            for packed in value:
                facts.append(float if type(packed[0]) is float else _bound(packed))
        else:
            facts.append(value.dtype if value.data_ptr() % 16 == 0 else (value.dtype,))
    return tuple(facts)


class Kernel:
    """A ``@triton.jit`` function with the parameters it is compiled for; they stand last among its parameters, in order.

    Operands, of the kinds that the parameter KINDS tells, stand before them.
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
        active = driver.active
        device, own = active.get_current_device(), arguments[0].get_device()
        if own != device and own >= 0:
            with on_device(arguments[0].device):
                self(programs, *arguments)
            return
        key = _bound(arguments[self._looked_at], device)
        found = self._compiled.get(key)
        if found is None:
            compiled = self._launch(programs, arguments)
            if _is_nvidia(device):
                described = compiled.function, compiled.packed_metadata, None, None, None  # for no hook
                self._compiled[key] = compiled, compiled.run, described
        elif _is_watched():
            found[0][(programs, 1, 1)](*arguments, *self._constants)
        else:
            _, run, described = found
            run(programs, 1, 1, active.get_current_stream(device), *described, *arguments, *self._constants)

    def _launch(self, programs: int, arguments: tuple[Any, ...]) -> Any:
        return self._function[(programs,)](*arguments, *self._constants, num_warps=self._num_warps, **OPTIONS)
