"""The meaning of each instruction of PTX that our kernels compile to, after NVIDIA's PTX ISA."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from .machine import WARP, Kernel, Mask, Run, State
from .memory import FaultError
from .parse import Instruction, UnsupportedError, address, registers
from .values import FLOATS, UINT, WIDTH, Array, decode, extreme, flushed, fma, integer, is_pair

Meaning = Callable[[Kernel, Instruction], Run]
_MEANINGS: dict[str, Meaning] = {}


def _means(*names: str) -> Callable[[Meaning], Meaning]:
    def register(meaning: Meaning) -> Meaning:
        _MEANINGS.update(dict.fromkeys(names, meaning))
        return meaning

    return register


def meaning(kernel: Kernel, instruction: Instruction) -> Run:
    """What runs an instruction."""
    try:
        return _MEANINGS[instruction.name](kernel, instruction)
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise UnsupportedError(f"{instruction.text}: {error!r}") from error


def _refuse(i: Instruction, unless: bool) -> None:
    if not unless:
        raise UnsupportedError(i.text)


# ------------------------------------------------------------------------------------------------------------- arithmetic


def _pointwise(k: Kernel, i: Instruction, function: Callable[..., Array], ftz: bool = False) -> Run:
    """A function of values of the one type; with ftz, denormal inputs and results are zeros."""
    reads, put = [k.values(o, i.type) for o in i.operands[1:]], k.writer(i.operands[0], i.type)
    if not ftz:
        return lambda state, mask: put(state, function(*[read(state) for read in reads]), mask)
    return lambda state, mask: put(state, flushed(function(*[flushed(read(state)) for read in reads])), mask)


@_means("add", "sub")
def _add(k: Kernel, i: Instruction) -> Run:
    ftz = "ftz" in i.modifiers("rn", "ftz")
    return _pointwise(k, i, np.add if i.name == "add" else np.subtract, ftz)


@_means("mul", "mad")
def _mul(k: Kernel, i: Instruction) -> Run:
    m = i.modifiers("rn", "ftz", "lo", "hi", "wide")
    if i.type in FLOATS:
        _refuse(i, i.name == "mul" and m <= {"rn", "ftz"})
        return _pointwise(k, i, np.multiply, "ftz" in m)
    _refuse(i, len(m) == 1)
    width = WIDTH[i.type]
    result = f"{i.type[0]}{2 * width}" if "wide" in m else i.type
    product = {"wide": _wide, "hi": _high, "lo": np.multiply}[next(iter(m))]
    a, b = (k.values(o, i.type) for o in i.operands[1:3])
    put = k.writer(i.operands[0], result)
    if i.name == "mul":
        return lambda state, mask: put(state, product(a(state), b(state)), mask)
    c = k.values(i.operands[3], result)
    return lambda state, mask: put(state, product(a(state), b(state)) + c(state), mask)


def _wide(a: Array, b: Array) -> Array:
    wide = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
    return a.astype(wide) * b.astype(wide)


def _high(a: Array, b: Array) -> Array:
    """The upper half of a product."""
    if a.dtype.itemsize < 8:
        product = _wide(a, b)
        return (product >> product.dtype.type(8 * a.dtype.itemsize)).astype(a.dtype)
    return np.array([p >> 64 for p in np.atleast_1d(a.astype(object) * b.astype(object))], object).astype(a.dtype)


@_means("fma")
def _fma(k: Kernel, i: Instruction) -> Run:
    m = i.modifiers("rn", "ftz")
    _refuse(i, "rn" in m)
    return _pointwise(k, i, fma, "ftz" in m)


@_means("div", "rem")
def _div(k: Kernel, i: Instruction) -> Run:
    m = i.modifiers("rn", "full", "ftz")
    if i.type in FLOATS:
        _refuse(i, i.name == "div" and ("rn" in m) != ("full" in m))
        return _pointwise(k, i, np.divide, "ftz" in m) if "rn" in m else _approximate(k, i, "div", np.divide)

    def divide(a: Array, b: Array) -> Array:
        """Towards zero; by zero all ones, as hardware gives."""
        a, b = np.broadcast_arrays(a, b)
        divisor = np.where(b == 0, b.dtype.type(1), b)
        rest = np.fmod(a, divisor)
        if i.name == "rem":
            return np.where(b == 0, a, rest)
        return np.where(b == 0, ~np.zeros_like(a), (a - rest) // divisor)

    return _pointwise(k, i, divide)


def _approximate(k: Kernel, i: Instruction, name: str, function: Callable[..., Array]) -> Run:
    _refuse(i, i.type == "f32")
    ftz = "ftz" in i.parts
    reads, put = [k.values(o, "f32") for o in i.operands[1:]], k.writer(i.operands[0], "f32")

    def run(state: State, mask: Mask) -> None:
        inputs = np.broadcast_arrays(*[flushed(read(state)) if ftz else read(state) for read in reads])
        found = k.approximate(
            name, function(*[x.astype(np.float64) for x in inputs]), *map(np.ascontiguousarray, inputs)
        )
        put(state, flushed(found) if ftz else found, mask)

    return run


_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "rcp": lambda x: 1 / x,
    "sqrt": np.sqrt,
}


@_means(*_FUNCTIONS)
def _function(k: Kernel, i: Instruction) -> Run:
    m, exact = i.modifiers("approx", "ftz", "rn"), _FUNCTIONS[i.name]
    if "rn" in m:
        _refuse(i, i.name in ("rcp", "sqrt"))
        return _pointwise(k, i, lambda x: exact(x).astype(x.dtype), "ftz" in m)
    if i.type == "f64":
        _refuse(i, "ftz" in m and i.name in ("rcp", "rsqrt"))
        return _pointwise(k, i, lambda x: _coarse(exact, x))
    return _approximate(k, i, i.name, exact)


_UPPER, _TINY = np.uint64(0xFFFFFFFF00000000), np.finfo(np.float64).tiny


def _coarse(exact: Callable[[Array], Array], x: Array) -> Array:
    """Of a float64 by the upper 32 bits, which are all that the result has."""
    found = _flushed64(exact(_flushed64((x.view(np.uint64) & _UPPER).view(np.float64))))
    near = ((found.view(np.uint64) + np.uint64(1 << 31)) & _UPPER).view(np.float64)
    return _flushed64(np.where(np.isfinite(found), near, found))


def _flushed64(x: Array) -> Array:
    return np.where(np.abs(x) < _TINY, np.copysign(0.0, x), x)


@_means("min", "max")
def _extreme(k: Kernel, i: Instruction) -> Run:
    m = i.modifiers("ftz", "NaN")
    return _pointwise(k, i, lambda a, b: extreme(a, b, i.name == "max", "NaN" in m), "ftz" in m)


@_means("abs", "neg")
def _sign(k: Kernel, i: Instruction) -> Run:
    """Of floats by their bits, which keeps a NaN's."""
    ftz = "ftz" in i.modifiers("ftz")
    if ftz or i.type not in FLOATS:
        return _pointwise(k, i, np.abs if i.name == "abs" else np.negative, ftz)
    width = WIDTH[i.type]
    each = width // 2 if is_pair(i.type) else width
    sign = UINT[width](sum(1 << (end - 1) for end in range(each, width + 1, each)))
    read, register = k.bits(i.operands[1], width), i.operands[0]
    if i.name == "abs":
        return lambda state, mask: state.put(register, read(state) & ~sign, mask)
    return lambda state, mask: state.put(register, read(state) ^ sign, mask)


# ------------------------------------------------------------------------------------------------------------------- bits

_LOGIC: dict[str, Any] = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}


@_means(*_LOGIC)
def _logic(k: Kernel, i: Instruction) -> Run:
    i.modifiers()
    return _pointwise(k, i, _LOGIC[i.name])


@_means("shl", "shr")
def _shift(k: Kernel, i: Instruction) -> Run:
    """An amount beyond the width shifts everything out."""
    i.modifiers()
    width = WIDTH[i.type]
    value, amount, put = k.values(i.operands[1], i.type), k.bits(i.operands[2], 32), k.writer(i.operands[0], i.type)

    def run(state: State, mask: Mask) -> None:
        x, by = value(state), amount(state)
        inside = np.minimum(by, np.uint32(width - 1)).astype(x.dtype)
        if i.name == "shr" and x.dtype.kind == "i":
            put(state, x >> inside, mask)
        else:
            shifted = x >> inside if i.name == "shr" else x << inside
            put(state, np.where(by >= width, x.dtype.type(0), shifted), mask)

    return run


@_means("bfe")
def _bfe(k: Kernel, i: Instruction) -> Run:
    """So many bits from a place on, with the sign of a signed type."""
    i.modifiers()
    width, place, length = WIDTH[i.type], int(i.operands[2]), int(i.operands[3])
    _refuse(i, 0 < length <= width - place)
    dtype = integer(i.type)
    return _field(k, i, lambda x: (x << dtype(width - place - length)) >> dtype(width - length))


def _field(k: Kernel, i: Instruction, function: Callable[[Array], Array]) -> Run:
    read, put = k.values(i.operands[1], i.type), k.writer(i.operands[0], i.type)
    return lambda state, mask: put(state, function(read(state)), mask)


@_means("bfi")
def _bfi(k: Kernel, i: Instruction) -> Run:
    """The second operand, with so many bits of the first in it from a place on."""
    _refuse(i, i.parts == ("b32",))
    place, length = int(i.operands[3]), int(i.operands[4])
    _refuse(i, 0 < length <= 32 - place)
    a, b, at, field = k.bits(i.operands[1], 32), k.bits(i.operands[2], 32), np.uint32(place), (1 << length) - 1
    kept, low = np.uint32(~(field << place) & 0xFFFFFFFF), np.uint32(field)
    return lambda state, mask: state.put(i.operands[0], b(state) & kept | (a(state) & low) << at, mask)


@_means("prmt")
def _prmt(k: Kernel, i: Instruction) -> Run:
    """Each byte of the result is one of the eight of both operands, or its sign over and over."""
    _refuse(i, i.parts == ("b32",))
    a, b, selector = (k.bits(o, 32) for o in i.operands[1:])

    def run(state: State, mask: Mask) -> None:
        pool, chosen = a(state).astype(np.uint64) | b(state).astype(np.uint64) << np.uint64(32), selector(state)
        out = np.uint32(0)
        for j in range(4):
            four = chosen >> np.uint32(4 * j) & np.uint32(15)
            byte = (pool >> ((four & np.uint32(7)).astype(np.uint64) * np.uint64(8)) & np.uint64(255)).astype(np.uint32)
            byte = np.where(four & np.uint32(8), (byte >> np.uint32(7)) * np.uint32(255), byte)
            out = out | byte << np.uint32(8 * j)
        state.put(i.operands[0], out, mask)

    return run


@_means("popc")
def _popc(k: Kernel, i: Instruction) -> Run:
    read, put = k.bits(i.operands[1], WIDTH[i.type]), k.writer(i.operands[0], "u32")
    return lambda state, mask: put(state, np.bitwise_count(read(state)).astype(np.uint32), mask)


# ------------------------------------------------------------------------------------------------- compare, select, move

_ORDERED: dict[str, Any] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def _comparison(i: Instruction) -> Callable[[Array, Array], Array]:
    name = i.parts[0]
    if i.type not in FLOATS:
        return _ORDERED[name]  # type: ignore[no-any-return]
    if name in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) ^ (name == "num")
    if name in _ORDERED:
        return lambda a, b: _ORDERED[name](a, b) & ~(np.isnan(a) | np.isnan(b))  # != of numpy is true for NaN
    _refuse(i, name[-1] == "u")
    unordered = _ORDERED[name[:-1]]
    return lambda a, b: unordered(a, b) | np.isnan(a) | np.isnan(b)


@_means("setp")
def _setp(k: Kernel, i: Instruction) -> Run:
    more = [part for part in i.parts[1:-1] if part != "ftz"]
    _refuse(i, len(i.operands) == 3 + len(more) and set(more) <= {"and", "or", "xor"})
    a, b = (k.values(o, i.type) for o in i.operands[1:3])
    compare, targets, ftz = _comparison(i), [t.strip() for t in i.operands[0].split("|")], "ftz" in i.parts
    third = k.bits(i.operands[3], 1) if more else None
    _refuse(i, is_pair(i.type) == (len(targets) == 2))

    def run(state: State, mask: Mask) -> None:
        found = compare(flushed(a(state)), flushed(b(state))) if ftz else compare(a(state), b(state))
        for j, target in enumerate(targets):
            bit = found[:, j] if is_pair(i.type) else found
            state.put(target, bit if third is None else _LOGIC[more[0]](bit, third(state)), mask)

    return run


@_means("selp")
def _selp(k: Kernel, i: Instruction) -> Run:
    i.modifiers()
    a, b = (k.bits(o, WIDTH[i.type]) for o in i.operands[1:3])
    p = k.bits(i.operands[3], 1)
    return lambda state, mask: state.put(i.operands[0], np.where(p(state), a(state), b(state)), mask)


@_means("mov")
def _mov(k: Kernel, i: Instruction) -> Run:
    """A register, or a wide one from or to its parts."""
    i.modifiers()
    width, (target, source) = WIDTH[i.type], i.operands
    if target.startswith("{"):
        parts, whole = registers(target), k.bits(source, width)
        each = width // len(parts)

        def unpack(state: State, mask: Mask) -> None:
            x = whole(state)
            for j, part in enumerate(parts):
                state.put(part, (x >> x.dtype.type(j * each)).astype(UINT[each]), mask)

        return unpack
    if source.startswith("{"):
        parts, dtype = registers(source), UINT[width]
        each = width // len(parts)
        reads = [k.bits(part, each) for part in parts]

        def pack(state: State, mask: Mask) -> None:
            out = dtype(0)
            for j, part in enumerate(reads):
                out = out | part(state).astype(dtype) << dtype(j * each)
            state.put(target, out, mask)

        return pack
    read = k.bits(source, width)
    return lambda state, mask: state.put(target, read(state), mask)


# ------------------------------------------------------------------------------------------------------------ conversions

_ROUND: dict[str, Any] = {"rn": np.rint, "rz": np.trunc, "rm": np.floor, "rp": np.ceil}


@_means("cvt")
def _cvt(k: Kernel, i: Instruction) -> Run:
    *_, to, source = i.parts
    m, ftz = set(i.parts[:-2]) - {"ftz"}, "ftz" in i.parts
    if is_pair(to):  # d = {high: a, low: b}
        _refuse(i, source == "f32" and m == {"rn"})
        high, low, put = k.values(i.operands[1], source), k.values(i.operands[2], source), k.writer(i.operands[0], to)
        return lambda state, mask: put(state, np.stack(np.broadcast_arrays(low(state), high(state)), axis=-1), mask)
    _refuse(i, m <= {"rn", "rni", "rzi", "rmi", "rpi"} and len(m) <= 1)
    how = next(iter(m), "")
    if to in FLOATS and source in FLOATS:
        narrows = WIDTH[to] < WIDTH[source] or {to, source} == {"f16", "bf16"}
        _refuse(i, how == ("rn" if narrows else "") or how.endswith("i"))
    else:
        _refuse(i, how == ("rn" if to in FLOATS else how) and bool(how) == (to in FLOATS or source in FLOATS))
    convert = _conversion(to, source, how)
    read, put = k.values(i.operands[1], source), k.writer(i.operands[0], to)
    return lambda state, mask: put(state, convert(flushed(read(state)) if ftz else read(state)), mask)


def _conversion(to: str, source: str, how: str) -> Callable[[Array], Array]:
    """What converts values; the writer rounds to a type narrower than what this gives."""
    if to not in FLOATS:
        if source in FLOATS:
            return lambda x: _to_integer(x, to, source, _ROUND[how[:2]])
        return lambda x: x.astype(integer(to))
    if how.endswith("i"):
        return lambda x: _ROUND[how[:2]](x)  # type: ignore[no-any-return]
    if to in ("f16", "bf16"):
        return lambda x: x if x.dtype.kind == "f" else _as_float64(x)
    return lambda x: x.astype(np.float64 if to == "f64" else np.float32)


def _to_integer(x: Array, to: str, source: str, rounded: Any) -> Array:
    """Rounded and held within the range; NaN is 0, or the top bit alone where 64 bits take part."""
    dtype = np.dtype(integer(to))
    info, whole = np.iinfo(dtype), rounded(x.astype(np.float64))
    over, under = whole >= float(info.max), whole <= float(info.min)
    inside = np.where(np.isnan(whole) | over | under, 0.0, whole).astype(dtype)
    found = np.where(over, dtype.type(info.max), np.where(under, dtype.type(info.min), inside))
    if source == "f64" or WIDTH[to] == 64:
        found = np.where(np.isnan(x), UINT[WIDTH[to]](1 << (WIDTH[to] - 1)).astype(dtype), found)
    return found


def _as_float64(x: Array) -> Array:
    """Integers as float64; what that cannot hold is rounded to odd, so that it is rounded once in the end."""
    if x.dtype.itemsize == 8:
        low = x & x.dtype.type(0x7FF)
        odd = np.where(low != 0, (x - low) | x.dtype.type(0x800), x)
        x = np.where(x.astype(np.float64).astype(object) == x.astype(object), x, odd)
    return x.astype(np.float64)


# ----------------------------------------------------------------------------------------------------------------- memory

# Where a cache keeps a line, and how an access is ordered with others, changes no value here.
_HINTS = {"ca", "cg", "cs", "wb", "L1::evict_first", "L1::evict_last", "relaxed", "gpu", "volatile"}


def _accessed(i: Instruction, place: int) -> tuple[str, str, list[str]]:
    """Space, type, and the registers that stand at an operand's place."""
    space, *rest, type = i.parts
    found = registers(i.operands[place])
    size = f"v{len(found)}"
    _refuse(i, set(rest) <= _HINTS | {size} and (size in rest) == (len(found) > 1))
    return space, f"b{WIDTH[type]}" if type in FLOATS else type, found


def _addresses(state: State, pointer: Callable[[State], Array], offset: int, on: Any) -> Array:
    return np.broadcast_to(pointer(state), (state.count,))[on].astype(np.int64) + offset


def _spread(state: State, values: Array, mask: Mask) -> Array:
    """What some threads have, as a vector of all."""
    values = np.ascontiguousarray(values)
    if mask is None:
        return values
    whole = np.zeros(state.count, values.dtype)
    whole[mask] = values
    return whole


@_means("ld")
def _ld(k: Kernel, i: Instruction) -> Run:
    space, type, names = _accessed(i, 0)
    base, offset = address(i.operands[1])
    width = WIDTH[type]
    dtype, puts = UINT[width], [k.writer(name, type) for name in names]
    if space == "param":
        (put,) = puts
        place = next(p.offset for p in k.program.parameters if p.name == base) + offset
        return lambda state, mask: put(state, decode(np.frombuffer(state.arguments, dtype, 1, place), type), mask)
    _refuse(i, space in ("global", "shared"))
    pointer = k.bits(base, 64 if space == "global" else 32)

    def run(state: State, mask: Mask) -> None:
        on = slice(None) if mask is None else mask
        at = _addresses(state, pointer, offset, on)
        if space == "global":
            found = state.memory.load(at, width // 8, len(puts), state.thread[on], i.text)
        else:
            found = state.shared.load(state.block[on], at, len(puts) * width // 8, state.warp[on], i.text)
            found = np.ascontiguousarray(found).view(dtype)
        for j, put in enumerate(puts):
            put(state, decode(_spread(state, found[:, j], mask), type), mask)

    return run


@_means("st")
def _st(k: Kernel, i: Instruction) -> Run:
    space, type, names = _accessed(i, 1)
    base, offset = address(i.operands[0])
    reads = [k.bits(name, WIDTH[type]) for name in names]
    _refuse(i, space in ("global", "shared"))
    pointer = k.bits(base, 64 if space == "global" else 32)

    def run(state: State, mask: Mask) -> None:
        on = slice(None) if mask is None else mask
        at = _addresses(state, pointer, offset, on)
        values = np.stack([np.broadcast_to(read(state), (state.count,))[on] for read in reads], axis=1)
        if space == "global":
            state.memory.store(at, WIDTH[type] // 8, values, state.thread[on], i.text)
        else:
            state.shared.store(state.block[on], at, values.view(np.uint8), state.warp[on], i.text)

    return run


@_means("atom", "red")
def _atom(k: Kernel, i: Instruction) -> Run:
    """Addition of integers."""
    _refuse(i, i.parts[-2] == "add" and i.type[0] in "us" and set(i.parts[:-2]) <= _HINTS | {"global", "shared"})
    operands = i.operands if i.name == "atom" else ("_", *i.operands)
    base, offset = address(operands[1])
    is_shared = "shared" in i.parts
    value, pointer = k.bits(operands[2], WIDTH[i.type]), k.bits(base, 32 if is_shared else 64)
    put = k.writer(operands[0], f"b{WIDTH[i.type]}")

    def run(state: State, mask: Mask) -> None:
        on = slice(None) if mask is None else mask
        at, values = _addresses(state, pointer, offset, on), np.broadcast_to(value(state), (state.count,))[on]
        if is_shared:
            before = state.shared.add(state.block[on], at, values, state.warp[on], i.text)
        else:
            before = state.memory.add(at, values.dtype.itemsize, values, state.thread[on], i.text)
        put(state, _spread(state, before, mask), mask)

    return run


@_means("ldmatrix", "stmatrix")
def _matrix(k: Kernel, i: Instruction) -> Run:
    """8 x 8 matrices of 16 bits. Lane 8 m + row has the address of a row of matrix m; lane l has of each matrix, in a register,
    row l / 4, columns 2 (l % 4) and the next; with .trans rows are columns."""
    load = i.name == "ldmatrix"
    base, offset = address(i.operands[1 if load else 0])
    names, pointer = registers(i.operands[0 if load else 1]), k.bits(base, 32)
    known = ("sync", "aligned", "m8n8", f"x{len(names)}", *(["trans"] if "trans" in i.parts else []), "shared", "b16")
    _refuse(i, i.parts == known)
    reads = [] if load else [k.bits(name, 32) for name in names]

    def run(state: State, mask: Mask) -> None:
        _check_warps(state, mask, np.uint32([0xFFFFFFFF]), i.text)
        on = slice(None) if mask is None else mask
        at = _addresses(state, pointer, offset, slice(None))
        first, block, warp = np.arange(state.count) - state.lane, state.block[on], state.warp[on]
        out = np.zeros((len(names), state.count), np.uint32)
        for m, h in itertools.product(range(len(names)), range(2)):
            row, column = state.lane // 4, 2 * (state.lane % 4) + h
            row, column = (column, row) if "trans" in i.parts else (row, column)
            rows = at[first + 8 * m + row]
            if (rows[on] % 16).any():
                raise FaultError(f"{i.text}: misaligned row")
            place = (rows + 2 * column)[on]
            if load:
                half = np.ascontiguousarray(state.shared.load(block, place, 2, warp, i.text)).view(np.uint16)[:, 0]
                out[m, on] |= half.astype(np.uint32) << np.uint32(16 * h)
            else:
                half = (np.broadcast_to(reads[m](state), (state.count,))[on] >> np.uint32(16 * h)).astype(np.uint16)
                state.shared.store(block, place, half[:, None].view(np.uint8), warp, i.text)
        for name, bits in zip(names, out if load else ()):
            state.put(name, bits, mask)

    return run


# ---------------------------------------------------------------------------------------------------------------- threads


def _check_warps(state: State, mask: Mask, members: Array, text: str) -> None:
    """All members of each warp of which a lane is here are here."""
    here = np.broadcast_to(members, (state.count,))
    if ((here if mask is None else here[mask]) != np.uint32(0xFFFFFFFF)).any():
        raise UnsupportedError(f"{text}: some lanes of a warp")
    if mask is not None and (mask.reshape(-1, WARP).any(1) != mask.reshape(-1, WARP).all(1)).any():
        raise FaultError(f"{text}: lanes are missing")


@_means("bar")
def _bar(k: Kernel, i: Instruction) -> Run:
    if i.parts == ("warp", "sync"):
        return lambda state, mask: _check_warps(state, mask, k.bits(i.operands[0], 32)(state), i.text)
    _refuse(i, i.parts == ("sync",) and i.operands == ("0",))

    def run(state: State, mask: Mask) -> None:
        live = state.live.reshape(-1, state.threads)
        here = live if mask is None else mask.reshape(-1, state.threads)
        blocks = here.any(1)
        if (here[blocks] != live[blocks]).any():
            raise FaultError("bar.sync: threads of the block are elsewhere")
        state.shared.barrier(blocks)
        state.memory.barrier(state.blocks[blocks])

    return run


@_means("shfl")
def _shfl(k: Kernel, i: Instruction) -> Run:
    sync, mode, type = i.parts
    _refuse(i, sync == "sync" and type == "b32")
    target, *predicate = (t.strip() for t in i.operands[0].split("|"))
    a, b, c, members = (k.bits(o, 32) for o in i.operands[1:])

    def run(state: State, mask: Mask) -> None:
        _check_warps(state, mask, members(state), i.text)
        x, lane = np.broadcast_to(a(state), (state.count,)), state.lane
        by, clamp, segment = (
            (v & np.uint32(31)).astype(np.int64) for v in (b(state), c(state), c(state) >> np.uint32(8))
        )
        least, most = lane & segment, (lane & segment) | (clamp & ~segment)
        source = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": least | (by & ~segment)}[mode]
        valid = source >= most if mode == "up" else source <= most
        state.put(target, x[np.arange(state.count) - lane + np.where(valid, source, lane)], mask)
        if predicate:
            state.put(predicate[0], valid, mask)

    return run


@_means("vote")
def _vote(k: Kernel, i: Instruction) -> Run:
    """A bit for each lane of the warp."""
    _refuse(i, i.parts == ("sync", "ballot", "b32"))
    p, members = k.bits(i.operands[1], 1), k.bits(i.operands[2], 32)

    def run(state: State, mask: Mask) -> None:
        _check_warps(state, mask, members(state), i.text)
        on = np.broadcast_to(p(state), (state.count,)).reshape(-1, WARP)
        ballot = (on.astype(np.uint32) << np.arange(WARP, dtype=np.uint32)).sum(axis=1, dtype=np.uint32)
        state.put(i.operands[0], np.repeat(ballot, WARP), mask)

    return run


@_means("redux")
def _redux(k: Kernel, i: Instruction) -> Run:
    sync, how, type = i.parts
    _refuse(i, sync == "sync")
    reduce = {"add": np.add, "min": np.minimum, "max": np.maximum, **_LOGIC}[how].reduce
    a, members, put = k.values(i.operands[1], type), k.bits(i.operands[2], 32), k.writer(i.operands[0], type)

    def run(state: State, mask: Mask) -> None:
        _check_warps(state, mask, members(state), i.text)
        x = np.broadcast_to(a(state), (state.count,)).reshape(-1, WARP)
        put(state, np.repeat(reduce(x, axis=1, dtype=x.dtype), WARP), mask)

    return run
