"""Tools over Triton's interpreter: right bfloat16, bytes moved, stray accesses, outputs left unwritten.

fix_bf16       conversions round as hardware does, and arithmetic on raw bfloat16 raises
fix_minmax     tl.maximum, tl.minimum and tl.clamp drop NaN, as compiled ones do
run_faster     leaves out what the interpreter does again and again to no effect: half of its time
traffic        counts what is loaded from and stored to named tensors, and raises on any other access
poison         fills what torch.empty and its kind return
sentinel_view  lays a tensor into a larger buffer, and checks that nothing around it was written
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import torch
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

Kind = Literal["load", "store", "atomic"]

_SENTINEL = 0xA5


# Interpreter ----------------------------------------------------------------------------------------------------------


class RawBfloat16Error(TypeError):
    """Arithmetic or comparison on bfloat16: the interpreter computes on its bits, a GPU in bfloat16."""


_STOCK: dict[str, Any] = {
    name: getattr(interpreter.InterpreterBuilder, name)
    for name in ("cast_impl", "create_fp_to_fp", "binary_op", "unary_op", "ternary_op", "create_fma")
}
_STOCK_CHECK_TENSOR: Any = interpreter.ReduceScanOpInterface.check_tensor


def fix_bf16(strict: bool = True) -> None:
    """Round float32 -> bfloat16 to nearest even (the interpreter truncates); if strict, raise on raw arithmetic."""
    builder = interpreter.InterpreterBuilder
    builder.cast_impl = _cast
    builder.create_fp_to_fp = _fp_to_fp
    builder.get_bf16 = lambda self, value: self.cast_impl(self.get_fp32(value), tl.bfloat16)  # 3.6 to 3.8 have none
    for name in ("binary_op", "unary_op", "ternary_op", "create_fma"):
        setattr(builder, name, _refusing_bf16(_STOCK[name]) if strict else _STOCK[name])
    interpreter.ReduceScanOpInterface.check_tensor = _check_no_bf16 if strict else _STOCK_CHECK_TENSOR


def fix_minmax() -> None:
    """Make the NaN-dropping forms drop NaN, which 3.6 and 3.7 do not."""
    builder = interpreter.InterpreterBuilder
    builder.create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)
    builder.create_minnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)
    builder.create_clampf = _clamp


def run_faster() -> None:
    """Patch Triton's language once a process, not for each call of a device function; make what is asked for alone."""
    interpreter._patch_lang = _patch_lang_once
    interpreter._get_np_dtype = _np_dtype
    builder = interpreter.interpreter_builder  # would compute whether integers overflow, and ask only where debug is on
    builder.options = replace(builder.options, sanitize_overflow=False)
    tl.core.tuple.__init__ = _tuple_init
    tl.core.tuple.type = _TypeOfTuple()


class _Patch:
    """What restores nothing: a launch in another thread may still need it."""

    def restore(self) -> None:
        pass


_STOCK_PATCH_LANG: Any = interpreter._patch_lang
_STOCK_NP_DTYPE: Any = interpreter._get_np_dtype
_patched: set[tuple[bool, bool]] = set()  # whether of triton.language, and of its core
_seen: set[Any] = set()  # functions whose languages are patched
_np_dtypes: dict[str, Any] = {}


def _patch_lang_once(function: Any) -> _Patch:
    if function not in _seen:
        _seen.add(function)
        own = function.__globals__.values()
        languages = any(value is tl for value in own), any(value is tl.core for value in own)
        if languages not in _patched:
            _patched.add(languages)
            _STOCK_PATCH_LANG(function)
    return _Patch()


def _np_dtype(dtype: Any) -> Any:
    """Triton's own makes a table of 18 dtypes for each answer."""
    name = dtype.scalar.name
    if name not in _np_dtypes:
        _np_dtypes[name] = _STOCK_NP_DTYPE(dtype)
    return _np_dtypes[name]


def _tuple_init(self: Any, args: Any, type: Any = None) -> None:
    self.values = list(args)
    if type is not None:
        self.type = type if isinstance(type, tl.core.tuple_type) else tl.core.tuple_type(type)


class _TypeOfTuple:
    """The type of a tuple, such as each shape, made when it is asked for."""

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        if instance is None:
            return self
        instance.type = found = tl.core._type_for_tuple_values(instance.values)
        return found


def _cast(self: Any, source: Any, to: Any) -> Any:
    old, new = source.dtype.scalar, to.scalar
    if old == new or tl.bfloat16 not in (old, new) or old.is_fp8() or new.is_fp8():
        return _STOCK["cast_impl"](self, source, to)
    if old == tl.bfloat16:
        values = (source.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(values.astype(interpreter._get_np_dtype(new)), new)
    values = source.data.astype(np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return interpreter.TensorHandle(np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16), new)


def _fp_to_fp(self: Any, source: Any, to: Any, rounding: Any) -> Any:
    if rounding is None or rounding == interpreter._ir.ROUNDING_MODE.RTNE:
        types = (source.dtype.scalar, to.scalar)
        if tl.bfloat16 in types and not any(type.is_fp8() for type in types):
            return self.cast_impl(source, to)
    return _STOCK["create_fp_to_fp"](self, source, to, rounding)


def _refusing_bf16(stock: Callable[..., Any]) -> Callable[..., Any]:
    def operation(self: Any, *arguments: Any) -> Any:
        operands = [argument for argument in arguments if isinstance(argument, interpreter.TensorHandle)]
        if arguments[-1] is not np.where and any(operand.dtype.scalar == tl.bfloat16 for operand in operands):
            name = getattr(arguments[-1], "__name__", stock.__name__)
            raise RawBfloat16Error(f"{name} on bfloat16: upcast it with .to(tl.float32) after the load")
        return stock(self, *arguments)

    return operation


def _check_no_bf16(self: Any, inputs: Any) -> None:
    if any(argument.dtype.scalar == tl.bfloat16 for argument in inputs):
        raise RawBfloat16Error("reduction of bfloat16: upcast it with .to(tl.float32) after the load")
    _STOCK_CHECK_TENSOR(self, inputs)


def _clamp(self: Any, value: Any, low: Any, high: Any, propagate_nan: Any) -> Any:
    if propagate_nan == interpreter._ir.PROPAGATE_NAN.NONE:
        return self.binary_op(self.binary_op(value, low, np.fmax), high, np.fmin)
    return self.ternary_op(value, low, high, np.clip)


# Traffic --------------------------------------------------------------------------------------------------------------


class OutOfBoundsError(AssertionError):
    """A kernel touched memory that belongs to none of the named tensors."""


class _Region:
    """Memory between the first and last named byte of one storage: whose each byte is, and how often it was touched."""

    def __init__(self, start: int, size: int) -> None:
        self.start = start
        self.owners = np.full(size, -1, np.int16)
        self.hits: dict[Kind, npt.NDArray[np.int32]] = {
            kind: np.zeros(size, np.int32) for kind in ("load", "store", "atomic")
        }


class Traffic:
    """Bytes that active lanes moved, by name of tensor."""

    def __init__(self, tensors: Mapping[str, Tensor | Sequence[Tensor] | None]) -> None:
        self.loaded: Counter[str] = Counter()
        self.stored: Counter[str] = Counter()
        self.atomics: Counter[str] = Counter()
        self._names = list(tensors)
        self._regions: list[_Region] = []
        by_storage: dict[int, list[tuple[int, Tensor]]] = {}
        for owner, given in enumerate(tensors.values()):
            for tensor in [given] if isinstance(given, Tensor) else given or ():
                if tensor.numel():
                    by_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append((owner, tensor))
        for owned in by_storage.values():
            self._regions.append(self._region(owned))

    def _region(self, owned: list[tuple[int, Tensor]]) -> _Region:
        start = min(tensor.data_ptr() for _, tensor in owned)
        end = max(tensor.data_ptr() + _extent(tensor) * tensor.element_size() for _, tensor in owned)
        region = _Region(start, end - start)
        for owner, tensor in owned:
            view = region.owners[tensor.data_ptr() - start :]
            place: Any = slice(0, tensor.nbytes) if tensor.is_contiguous() else _byte_offsets(tensor).numpy()
            others = view[place][(view[place] != -1) & (view[place] != owner)]
            if others.size:
                names = sorted(self._names[sharing] for sharing in {owner, *others.tolist()})
                raise ValueError(f"{' and '.join(names)} share memory: give them as a tuple under one name")
            view[place] = owner
        return region

    @property
    def total(self) -> int:
        """All bytes moved, each as often as it was."""
        return sum(sum(counter.values()) for counter in (self.loaded, self.stored, self.atomics))

    def distinct(self, kind: Kind, name: str) -> int:
        """Bytes of the tensor that were touched at least once."""
        return sum(int((hits > 0).sum()) for hits in self._hits(kind, name))

    def most(self, kind: Kind, name: str) -> int:
        """How often the byte of the tensor that was touched most was touched."""
        return max((int(hits.max()) for hits in self._hits(kind, name) if hits.size), default=0)

    def _hits(self, kind: Kind, name: str) -> list[npt.NDArray[np.int32]]:
        owner = self._names.index(name)
        return [region.hits[kind][region.owners == owner] for region in self._regions]

    def record(self, kind: Kind, pointers: Any, mask: Any) -> None:
        """Note an access by a TensorHandle of pointers, where the mask is on."""
        addresses = np.asarray(pointers.data).astype(np.int64)
        active = np.ones_like(addresses, bool) if mask is None else np.broadcast_to(mask.data, addresses.shape)
        self.note(kind, addresses[active.astype(bool)], max(1, pointers.get_element_ty().primitive_bitwidth // 8))

    def note(self, kind: Kind, remaining: npt.NDArray[np.int64], size: int) -> None:
        """Note an access to so many bytes at each address."""
        bytes_each = np.arange(size)
        counter = {"load": self.loaded, "store": self.stored, "atomic": self.atomics}[kind]
        for region in self._regions:
            offsets = remaining - region.start
            inside = (offsets >= 0) & (offsets + bytes_each.size <= region.owners.size)
            touched = offsets[inside, None] + bytes_each
            owners = region.owners[touched]
            whole = (owners[:, 0] >= 0) & (owners == owners[:, :1]).all(axis=1)
            np.add.at(region.hits[kind], touched[whole], 1)
            for owner, times in enumerate(np.bincount(owners[whole, 0]).tolist()):
                if times:
                    counter[self._names[owner]] += times * bytes_each.size
            inside[inside] = whole
            remaining = remaining[~inside]
        if remaining.size:
            where = min((int(remaining[0]) - region.start for region in self._regions), key=abs, default=None)
            raise OutOfBoundsError(
                f"{kind} of {remaining.size} elements outside of {', '.join(self._names) or 'nothing'}; "
                f"the first is {where} bytes from the start of the nearest"
            )


# method of the builder -> kind of access, place of the pointers, place of the mask
_ACCESSES: dict[str, tuple[Kind, int, int | None]] = {
    "create_masked_load": ("load", 0, 1),
    "create_masked_store": ("store", 0, 2),
    "create_atomic_rmw": ("atomic", 1, 3),
    "create_atomic_cas": ("atomic", 0, None),
}


@contextmanager
def traffic(**tensors: Tensor | Sequence[Tensor] | None) -> Iterator[Traffic]:
    """Count the bytes that kernels move inside, and raise OutOfBoundsError where one leaves the tensors named.

    Only the elements of a strided tensor belong to it, not the gaps between them. Tensors that are meant to share
    memory go under one name, as a tuple.
    """
    if not knobs.runtime.interpret:
        raise RuntimeError("traffic counts what interpreted kernels move: set TRITON_INTERPRET=1")
    counted = Traffic(tensors)

    def recording(name: str) -> Callable[..., Any]:
        stock = getattr(interpreter.InterpreterBuilder, name)
        kind, pointers, mask = _ACCESSES[name]

        def access(self: Any, *arguments: Any, **options: Any) -> Any:
            counted.record(kind, arguments[pointers], None if mask is None else arguments[mask])
            return stock(self, *arguments, **options)

        return access

    with ExitStack() as patches:
        for name in _ACCESSES:
            patches.enter_context(patch.object(interpreter.InterpreterBuilder, name, recording(name)))
        try:
            yield counted
        except InterpreterError as error:
            cause: BaseException | None = error
            while cause is not None:
                if isinstance(cause, OutOfBoundsError):
                    raise cause from None
                cause = cause.__cause__
            raise


# Memory ---------------------------------------------------------------------------------------------------------------


@contextmanager
def poison() -> Iterator[None]:
    """Fill what torch.empty and its kind return: floats with NaN, everything else with bytes of 0xA5."""

    def poisoned(stock: Callable[..., Any]) -> Callable[..., Any]:
        def create(*arguments: Any, **options: Any) -> Any:
            tensor = stock(*arguments, **options)
            if type(tensor) is Tensor and not tensor.is_meta and options.get("out") is None:
                memory = torch.tensor((), dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
                memory.fill_(0xFF if tensor.is_floating_point() or tensor.is_complex() else _SENTINEL)  # all ones: NaN
            return tensor

        return create

    with ExitStack() as patches:
        for owner, names in (
            (torch, ("empty", "empty_like", "empty_strided", "empty_permuted")),
            (Tensor, ("new_empty", "new_empty_strided")),
        ):
            for name in names:
                patches.enter_context(patch.object(owner, name, poisoned(getattr(owner, name))))
        yield


def sentinel_view(tensor: Tensor, offset: int = 1, margin: int = 4096) -> tuple[Tensor, Callable[[], None]]:
    """A view with the tensor's values and strides inside a larger buffer, and a check that only the view was written.

    The view starts offset elements after an aligned address, with margin elements more before it and after it. What the
    check guards includes the gaps between the view's elements.
    """
    size = tensor.element_size()
    extent = _extent(tensor)
    start = margin + offset
    buffer = torch.full(((start + extent + margin) * size,), _SENTINEL, dtype=torch.uint8, device=tensor.device)
    offsets = _byte_offsets(tensor).to(tensor.device)
    span = tensor.detach().as_strided((extent,), (1,)).contiguous().view(torch.uint8)
    buffer[start * size + offsets] = span[offsets]
    view = buffer.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), start)

    def check() -> None:
        changed = buffer != _SENTINEL
        changed[start * size + offsets] = False
        places = changed.nonzero().flatten().tolist()
        assert not places, (
            f"{len(places)} bytes written outside of the view, the first {places[0] - start * size} from it"
        )

    return view, check


def _extent(tensor: Tensor) -> int:
    """Elements from the first of a tensor to its last in memory, both included."""
    steps = ((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return sum(steps) + 1 if tensor.numel() else 0


def _byte_offsets(tensor: Tensor) -> Tensor:
    """Where the bytes of a tensor's elements lie, from its first."""
    offsets = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = offsets[..., None] + torch.arange(size) * stride
    return (offsets.flatten()[:, None] * tensor.element_size() + torch.arange(tensor.element_size())).flatten()
