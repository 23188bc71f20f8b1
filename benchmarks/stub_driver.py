"""A Triton driver for a GPU that is not there: kernels are compiled for it, their launches recorded and not made."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from functools import reduce
from operator import getitem
from types import SimpleNamespace, TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget

if TYPE_CHECKING:
    from typing_extensions import Self

Path = tuple[int, ...]

SM_90 = GPUTarget("cuda", 90, 32)

_devices = itertools.count(1_000_000)


class Launch(NamedTuple):
    """signature: the type of each parameter, "constexpr" for what the code was compiled for, tuples for tuples.

    constants and attributes go by path into it: (3,) is the fourth parameter, (3, 0) the first part of that.
    """

    kernel: str
    grid: tuple[int, int, int]
    num_warps: int
    signature: Mapping[str, Any]
    constants: Mapping[Path, Any]
    attributes: Mapping[Path, Any]
    specialised: frozenset[str]  # run-time numbers whose value was compiled in: 1, or a multiple of 16


class StubDriver:
    """Triton's driver while entered. A device number of its own keeps apart what is compiled meanwhile."""

    def __init__(self, target: GPUTarget = SM_90) -> None:
        self.target = target
        self.device = next(_devices)
        self.utils = SimpleNamespace(
            load_binary=lambda name, kernel, shared, device: (1, 1, 32, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132},
        )
        self._records: list[tuple[Any, Any, tuple[int, int, int]]] = []
        self._functions: list[Any] = []
        self._previous: list[Any] = []

    @property
    def launches(self) -> list[Launch]:
        return [
            Launch(
                source.name,
                grid,
                metadata.num_warps,
                source.signature,
                source.constants,
                source.attrs,
                _specialised(source),
            )
            for source, metadata, grid in self._records
        ]

    def clear(self) -> None:
        self._records.clear()

    def __enter__(self) -> Self:
        self._previous.append(triton.runtime.driver._active)
        triton.runtime.driver.set_active(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        triton.runtime.driver.set_active(self._previous.pop())
        self.forget()

    def forget(self) -> None:
        """Drop what was compiled."""
        for function in self._functions:
            for kernel in function.device_caches.pop(self.device, ({},))[0].values():
                kernel.module = None  # Triton 3.9 unloads a module with the kernel, by the driver of that later time
        self._functions.clear()

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        self._functions.append(source.fn)
        record = self._records.append

        def launch(x: int, y: int, z: int, *_: Any) -> None:
            record((source, metadata, (x, y, z)))

        return launch

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


def _specialised(source: Any) -> frozenset[str]:
    parameters = source.fn.params
    types = tuple(source.signature.values())
    constants = {path for path, value in source.constants.items() if isinstance(value, int | float)}
    aligned = {path for path, found in source.attrs.items() if found and reduce(getitem, path, types)[0] in "iu"}
    return frozenset(
        parameters[path[0]].name + "".join(f"[{place}]" for place in path[1:])
        for path in constants | aligned
        if not parameters[path[0]].is_constexpr
    )
