"""A Triton driver whose launches execute the compiled PTX on CPU tensors, and what makes triton_thresh use it.

    with on_ptx(PtxDriver(90, folder)) as driver:
        y = tt.hardshrink(x, 0.5)  # the pack's own autograd, launch cache and specialisation, Triton's compiler, then PTX

A launch may touch what its tensors span, and nothing else. It also holds what Triton compiled for to what the launch has:
alignment, numbers that were compiled in, dtypes. ptxas does not run; the PTX stands for the binary it would make.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.language.semantic import TritonSemantic

import triton_thresh as tt
from benchmarks.stub_driver import StubDriver
from triton_thresh import backend, gradients, losses, tuning
from triton_thresh.tuning import Choice, Config

from .approximation import Approximation, Mode
from .machine import Kernel
from .memory import FaultError, Global, Note

if TYPE_CHECKING:
    from typing_extensions import Self

TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


def span(t: Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte and behind its last."""
    extent = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride())) + 1 if t.numel() else 0
    return t.data_ptr(), t.data_ptr() + extent * t.element_size()


def _flat(types: Any, values: Any) -> Iterator[tuple[str, Any]]:
    """The run-time arguments with their types, tuples laid open."""
    for type, value in zip(types, values, strict=True):
        if isinstance(type, tuple):
            yield from _flat(type, value)
        elif type != "constexpr":
            yield type, value


_stock_load = TritonSemantic.load


def _load(self: Any, pointer: Any, mask: Any, other: Any, *rest: Any) -> Any:
    """What a masked load without `other` gives is undefined. NVIDIA's backend makes it 0, which would hide that it is missing."""
    if mask is not None and other is None:
        other = self.to_tensor(float("nan") if pointer.type.scalar.element_ty.is_floating() else 0x5A5A5A5A)
    return _stock_load(self, pointer, mask, other, *rest)


class PtxDriver(StubDriver):
    """Triton's driver while entered. What it compiles is kept in a folder of its own, since ptxas does not see it.

    `rewrite` changes the text of every kernel; `also` is memory that launches may touch beside their tensors; `note` is called
    for each access.
    """

    def __init__(
        self, arch: int, folder: Path, mode: Mode = "exact", rewrite: Callable[[str], str] = lambda text: text
    ) -> None:
        super().__init__(GPUTarget("cuda", arch, 32))
        self.approximate = Approximation(mode)
        self.note: Note | None = None
        self.also: Sequence[tuple[int, int]] = ()
        self.executed: Counter[str] = Counter()  # instructions of threads, by kernel
        self.kernels: list[Kernel] = []
        self.changed = 0  # kernels whose text `rewrite` changed
        self._folder, self._rewrite, self._stack = folder, rewrite, ExitStack()
        self.utils.load_binary = self._load

    def __enter__(self) -> Self:
        self._stack.enter_context(patch.object(CUDABackend, "make_cubin", lambda self, ptx, *_: ptx.encode()))
        self._stack.enter_context(triton.knobs.cache.scope())
        self._stack.enter_context(patch.object(TritonSemantic, "load", _load))
        triton.knobs.cache.dir = str(self._folder)
        return super().__enter__()

    def __exit__(self, *raised: object) -> None:
        triton.runtime.driver.set_active(self._previous.pop())  # what was compiled stays
        self._stack.close()

    def _load(self, name: str, ptx: bytes, shared: int, device: int) -> tuple[object, int, int, int, int]:
        """Module, function (its place among `kernels`), registers, spills, most threads."""
        text = ptx.decode()
        rewritten = self._rewrite(text)
        self.changed += rewritten != text
        self.kernels.append(Kernel(rewritten, shared, self.approximate))
        return object(), len(self.kernels) - 1, 32, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        self._functions.append(source.fn)
        types = tuple(source.signature.values())
        aligned = [path for path, found in source.attrs.items() if ["tt.divisibility", 16] in map(list, found)]
        compiled_in = [(p, v) for p, v in source.constants.items() if not source.fn.params[p[0]].is_constexpr]

        def launch(x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
            if triton.runtime.driver.active is not self:
                raise FaultError(f"{source.name}: compiled for another device than the current one")
            given = rest[4:]  # behind metadata and hooks
            for path in aligned:
                value = reduce(getitem, path, given)
                if (value.data_ptr() if isinstance(value, Tensor) else value) % 16:
                    raise FaultError(f"{source.name}: argument {path} was compiled as divisible by 16 and is {value}")
            for path, constant in compiled_in:
                if reduce(getitem, path, given) != constant:
                    raise FaultError(f"{source.name}: argument {path} was compiled as {constant}, another is given")
            arguments = list(_flat(types, given))
            values = [_value(source.name, type, value) for type, value in arguments]
            spans = [span(value) for _, value in arguments if isinstance(value, Tensor)]
            kernel = self.kernels[function]
            memory = Global([*spans, *self.also], kernel.program.threads, self.note)
            self.executed[source.name] += kernel.launch((x, y, z), values, memory)

        return launch


def _value(kernel: str, type: str, value: Any) -> Any:
    """An argument as it travels, if it is what the kernel was compiled for."""
    if isinstance(value, Tensor):
        if not value.is_cpu:
            raise FaultError(f"{kernel}: launched with a tensor on {value.device}")
        if type not in (f"*{TYPES[value.dtype]}", "*u1" if value.dtype == torch.bool else ""):
            raise FaultError(f"{kernel}: compiled for {type}, launched with {value.dtype}")
        return value.data_ptr()
    if type[0] in "iu":
        width = int(type[1:])
        if not -(1 << (width - 1)) <= value < 1 << (width - (type[0] == "i")):
            raise FaultError(f"{kernel}: {value} in a parameter of {type}")
    return value


# --------------------------------------------------------------------------------------------------------- triton_thresh

Sizes = Callable[..., Config]


def small(kind: str, itemsize: int, lanes: int = 32) -> Config:
    """Four elements a thread at a time, in few threads: a warp for a gate, two for a loss, which sums."""
    warps = 2 if "loss" in kind else 1
    return Config(128 * warps, warps)


@contextmanager
def on_ptx(driver: PtxDriver, sizes: Sizes = small) -> Iterator[PtxDriver]:
    """CPU tensors count as on a device that Triton drives, block sizes are these, and none is searched for."""
    assert not triton.knobs.runtime.interpret, "TRITON_INTERPRET is set: nothing would be compiled"
    table = gradients._table

    def tabled(tensors: Sequence[Tensor], *rest: Any) -> Any:
        driver.also = [span(t) for t in tensors]  # the kernel finds their addresses in the table
        return table(tensors, *rest)

    def resolve(kind: str, op: str, dtype: torch.dtype, *_: Any) -> Choice:
        return Choice(sizes(kind, dtype.itemsize), "default")

    with ExitStack() as stack:
        for target, name, value in (
            (backend, "is_driven", lambda device: device.type == "cpu"),
            (backend, "OP_DEVICES", backend.OP_DEVICES | {"cpu"}),
            (tuning, "default", sizes),
            (tuning, "_resolve", resolve),
            (tuning, "_settled", {}),
            (gradients, "_table", tabled),
        ):
            stack.enter_context(patch.object(target, name, value))
        losses._rescale_kernel.cache_clear()  # which holds a block size
        stack.callback(losses._rescale_kernel.cache_clear)
        stack.enter_context(driver)
        stack.enter_context(tt.use_backend("triton"))
        yield driver
