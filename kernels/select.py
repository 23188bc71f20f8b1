"""The k-th largest of a tensor, or of each row, by radix: exact, without a sort, the same bits on every run.

Elements become unsigned keys of the same order, NaN the largest. `rows` holds whole rows in registers and settles the key bit
by bit, from one read. A longer row takes one launch of `count` for each digit of 8 bits, most significant first: it counts
digits among the keys that begin with what is settled so far, which every program reads off the counts of the launch before.
`finish` settles the last digit.

work_ptr has, for each row, a plane of 256 counts for each digit, then one more: how many NaN there are, and at 2 * DIGIT + 2
what is settled with this digit (the key's first bits, the rank left). All are int64 and begin as 0.
"""

import triton
import triton.language as tl

BINS = tl.constexpr(256)


@triton.jit
def key_of(x, POSITIVE: tl.constexpr):
    """An unsigned integer that is larger where x is. POSITIVE: 0 for all that is not above 0; else NaN has the largest."""
    WIDTH: tl.constexpr = x.dtype.primitive_bitwidth
    SIGN: tl.constexpr = 1 << (WIDTH - 1)
    SIGNED: tl.constexpr = tl.int64 if WIDTH == 64 else tl.int32
    UNSIGNED: tl.constexpr = tl.uint64 if WIDTH == 64 else tl.uint32
    if x.dtype.is_floating():
        OWN: tl.constexpr = tl.int16 if WIDTH == 16 else SIGNED
        bits = x.to(OWN, bitcast=True).to(SIGNED)
        key = (bits ^ ((bits >> (WIDTH - 1)) & (SIGN - 1))).to(UNSIGNED, bitcast=True) ^ SIGN
    elif x.dtype.is_int_signed():
        key = x.to(SIGNED).to(UNSIGNED, bitcast=True) ^ SIGN
    else:
        key = x.to(UNSIGNED)
    if WIDTH < 32:
        key &= 2 * SIGN - 1
    if x.dtype.is_floating():
        value = x.to(tl.float64 if WIDTH == 64 else tl.float32)
        if POSITIVE:
            key = tl.where(value > 0, key, 0)
        else:
            key = tl.where(value == value, key, 2 * SIGN - 1)
    return key


@triton.jit
def value_of(key, DTYPE: tl.constexpr):
    """The value whose key this is. A float's key 0 is nobody's and gives NaN."""
    WIDTH: tl.constexpr = DTYPE.primitive_bitwidth
    SIGN: tl.constexpr = 1 << (WIDTH - 1)
    if DTYPE.is_floating():
        OWN: tl.constexpr = tl.int64 if WIDTH == 64 else (tl.int32 if WIDTH == 32 else tl.int16)
        bits = (key ^ SIGN).to(OWN)
        value = (bits ^ ((bits >> (WIDTH - 1)) & (SIGN - 1))).to(DTYPE, bitcast=True)
    elif DTYPE.is_int_signed():
        value = (key ^ SIGN).to(DTYPE)
    else:
        value = key.to(DTYPE)
    return value


@triton.jit
def _rank(k):
    """k: a number, or a pointer to one."""
    if k.dtype.is_ptr():
        k = tl.load(k)
    return k.to(tl.int64)


@triton.jit(do_not_specialize=["k", "height"])
def rows(
    x_ptr,
    out_ptr,
    k,
    height,
    n,
    stride,
    POSITIVE: tl.constexpr,
    ANY_NAN: tl.constexpr,
    HEIGHT: tl.constexpr,
    COLS: tl.constexpr,
):
    """out[row] = the k-th largest of n <= COLS elements, HEIGHT rows a program."""
    row = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    column = tl.arange(0, COLS)
    inside = (row < height)[:, None] & (column < n)[None, :]
    x = tl.load(x_ptr + row.to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0)
    key = tl.where(inside, key_of(x, POSITIVE), 0)
    least = tl.zeros([HEIGHT], tl.int32) + n
    if POSITIVE:
        least = tl.sum((key > 0).to(tl.int32), axis=1)
    least = tl.minimum(_rank(k), least)  # so many keys are at least the one that is looked for
    WIDTH: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth
    if ANY_NAN:
        least = tl.where(tl.max(key, axis=1) == (1 << WIDTH) - 1, 1, least)
    found = tl.zeros([HEIGHT], key.dtype)
    for bit in range(WIDTH):
        candidate = found | (tl.full([HEIGHT], 1 << (WIDTH - 1), key.dtype) >> bit)
        enough = tl.sum((key >= candidate[:, None]).to(tl.int32), axis=1) >= least
        found = tl.where(enough, candidate, found)
    tl.store(out_ptr + row, value_of(found, out_ptr.dtype.element_ty), mask=row < height)


@triton.jit
def _settled(work_ptr, k, DIGIT: tl.constexpr, DIGITS: tl.constexpr, POSITIVE: tl.constexpr, ANY_NAN: tl.constexpr):
    """The first bits of the key that is looked for, up to DIGIT and with it, and its rank among the keys that begin so."""
    bin = tl.arange(0, BINS)
    counts = tl.load(work_ptr + DIGIT * BINS + bin)
    state_ptr = work_ptr + DIGITS * BINS
    if DIGIT == 0:
        prefix = tl.zeros([], tl.int64)
        if POSITIVE:
            rank = tl.minimum(_rank(k), tl.sum(tl.where(bin < BINS // 2, 0, counts)))
        else:
            rank = tl.minimum(_rank(k), tl.sum(counts))
        if ANY_NAN:
            rank = tl.where(tl.load(state_ptr) > 0, 1, rank)
    else:
        prefix = tl.load(state_ptr + 2 * DIGIT)
        rank = tl.load(state_ptr + 2 * DIGIT + 1)
    above = tl.sum(counts) - tl.cumsum(counts)
    chosen = (above < rank) & (rank <= above + counts)  # one bin; none where the rank is 0, which leaves a key of 0
    prefix = prefix * BINS + tl.sum(tl.where(chosen, bin, 0))
    return prefix, rank - tl.sum(tl.where(chosen, above, 0))


@triton.jit
def _digits(
    x, inside, prefix, DIGIT: tl.constexpr, DIGITS: tl.constexpr, POSITIVE: tl.constexpr, ANY_NAN: tl.constexpr
):
    """Counts of the digit over the keys that begin with the prefix, and of NaN if they are asked for."""
    SHIFT: tl.constexpr = 8 * (DIGITS - 1 - DIGIT)
    key = key_of(x, POSITIVE)
    digit = ((key >> SHIFT) & (BINS - 1)).to(tl.int32)
    if DIGIT > 0:
        inside = inside & ((key >> (SHIFT + 8)) == prefix.to(key.dtype))
    counts = tl.histogram(digit, BINS, mask=inside)
    nans = tl.zeros([], tl.int32)
    if ANY_NAN and DIGIT == 0:
        nans = tl.sum((inside & (key == (1 << 8 * DIGITS) - 1)).to(tl.int32))
    return counts, nans


@triton.jit(do_not_specialize=["k", "parts"])
def count(
    x_ptr,
    work_ptr,
    k,
    n,
    stride,
    parts,
    DIGIT: tl.constexpr,
    DIGITS: tl.constexpr,
    POSITIVE: tl.constexpr,
    ANY_NAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up a digit's counts for rows of n elements, `parts` programs a row."""
    row = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    x_ptr += row.to(tl.int64) * stride
    work_ptr += row.to(tl.int64) * ((DIGITS + 1) * BINS)
    state_ptr = work_ptr + DIGITS * BINS
    prefix = tl.zeros([], tl.int64)
    if DIGIT > 0:
        prefix, rank = _settled(work_ptr, k, DIGIT - 1, DIGITS, POSITIVE, ANY_NAN)
        if part == 0:
            tl.store(state_ptr + 2 * DIGIT, prefix)
            tl.store(state_ptr + 2 * DIGIT + 1, rank)
    counts = tl.zeros([BINS], tl.int32)
    nans = tl.zeros([], tl.int32)
    lane = tl.arange(0, BLOCK)
    x_ptr += part * BLOCK
    left = n - part * BLOCK
    while left > 0:
        x = tl.load(x_ptr + lane, mask=lane < left, other=0)
        own, own_nans = _digits(x, lane < left, prefix, DIGIT, DIGITS, POSITIVE, ANY_NAN)
        counts += own
        nans += own_nans
        x_ptr += parts * BLOCK
        left -= parts * BLOCK
    tl.atomic_add(work_ptr + DIGIT * BINS + tl.arange(0, BINS), counts.to(tl.int64), mask=counts > 0, sem="relaxed")
    if ANY_NAN and DIGIT == 0:
        tl.atomic_add(state_ptr, nans.to(tl.int64), mask=nans > 0, sem="relaxed")


@triton.jit(do_not_specialize=["k"])
def finish(work_ptr, out_ptr, k, DIGITS: tl.constexpr, POSITIVE: tl.constexpr, ANY_NAN: tl.constexpr):
    """out[row] = the value whose key is settled by the counts of the last digit."""
    row = tl.program_id(0)
    work_ptr += row.to(tl.int64) * ((DIGITS + 1) * BINS)
    key, _ = _settled(work_ptr, k, DIGITS - 1, DIGITS, POSITIVE, ANY_NAN)
    tl.store(out_ptr + row, value_of(key.to(tl.uint64, bitcast=True), out_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["bins", "parts"])
def histogram(x_ptr, line_ptr, out_ptr, n, bins, parts, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """Add up how many of n elements lie in each of `bins` bins, at most BINS; element x is in number (x * a - b) * c.

    line_ptr points to a, b and c, in the type that is computed in.
    """
    COMPUTE: tl.constexpr = line_ptr.dtype.element_ty
    a = tl.load(line_ptr)
    b = tl.load(line_ptr + 1)
    c = tl.load(line_ptr + 2)
    part = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    counts = tl.zeros([BINS], tl.int32)
    x_ptr += part * BLOCK
    left = n - part * BLOCK
    while left > 0:
        x = tl.load(x_ptr + lane, mask=lane < left, other=0).to(COMPUTE)
        bin = tl.minimum(tl.maximum(((x * a - b) * c).to(tl.int32), 0), bins - 1)  # NaN may come out as any number
        counts += tl.histogram(bin, BINS, mask=lane < left)
        x_ptr += parts * BLOCK
        left -= parts * BLOCK
    bin = tl.arange(0, BINS)
    tl.atomic_add(out_ptr + bin, counts.to(tl.int64), mask=counts > 0, sem="relaxed")
