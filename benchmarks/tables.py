"""Records side by side: one row for an op, dtype, size and mode, with every provider in it; and Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.records import Record, Stamp
from benchmarks.run import COMPILE, EAGER, GRAD, ONE_PASS, OTHERS, PACK, PROVIDERS

MIB = 1 << 20
NONE = "–"
HEADS = {EAGER: "eager", COMPILE: "compile", GRAD: "compile+grad", PACK: "this", ONE_PASS: "this+inductor"}


@dataclass(frozen=True)
class Row:
    """One op, dtype, size and mode."""

    op: str
    dtype: str
    numel: int
    mode: str
    by: Mapping[str, Record]

    def ms(self, provider: str) -> float | None:
        record = self.by.get(provider)
        return record.ms if record else None

    def speedup(self, baseline: str) -> float | None:
        """How many times as long the baseline takes."""
        one, other = self.ms(PACK), self.ms(baseline)
        return other / one if one and other else None


def rows(records: Iterable[Record]) -> list[Row]:
    """In the order the ops appear, then by dtype, size and mode; without the copies."""
    found: dict[tuple[str, str, int, str], dict[str, Record]] = {}
    for record in records:
        if record.op != record.provider:
            found.setdefault((record.op, record.dtype, record.numel, record.mode), {})[record.provider] = record
    order = list(dict.fromkeys(op for op, *_ in found))
    dtypes = list(dict.fromkeys(dtype for _, dtype, *_ in found))
    ranked = sorted(found.items(), key=lambda item: (order.index(item[0][0]), dtypes.index(item[0][1]), item[0][2]))
    return [Row(*key, by) for key, by in ranked]


def steps(found: Iterable[Row]) -> list[Row]:
    """The rows of a training step: forward and backward, or forward alone for what has no backward pass."""
    found = list(found)
    both = {row.op for row in found if row.mode == "both"}
    return [row for row in found if row.mode == ("both" if row.op in both else "forward")]


def fullest(found: Iterable[Row]) -> int:
    """The size at which the most was measured; the largest of several."""
    counts = Counter(row.numel for row in found)
    return max(counts, key=lambda numel: (counts[numel], numel))


def size(numel: int) -> str:
    """2²⁰ for 1048576; other numbers as they are."""
    if numel & (numel - 1) == 0:
        return "2" + str(numel.bit_length() - 1).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{numel:,}"


def digits(value: float | None, count: int = 2) -> str:
    """A figure with so many digits: the third one differs from machine to machine, and often from run to run."""
    return NONE if value is None else f"{float(f'{value:.{count}g}'):g}"


def markdown(heads: Sequence[str], lines: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table whose first `left` columns are text and the others figures."""
    rule = ["---"] * left + ["--:"] * (len(heads) - left)
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in (heads, rule, *lines))
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def described(stamp: Stamp, dates: Iterable[str]) -> str:
    """The stamp in one line."""
    days = sorted({date[:10] for date in dates})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    threads = f" ({stamp.threads} thread{'s' * (stamp.threads != 1)})" if stamp.threads else ""
    parts = [stamp.device + threads, when, f"commit {stamp.commit}", f"torch {stamp.torch}"]
    if stamp.triton:
        parts.append(f"triton {stamp.triton}")
    if stamp.cuda:
        parts += [f"CUDA {stamp.cuda}", f"driver {stamp.driver or 'unknown'}"]
    return ", ".join(parts)


Column = tuple[str, Callable[[Row], str]]


def short_columns() -> Iterator[Column]:
    """A row's case, and times and ratios of every provider."""
    yield "op", lambda row: row.op
    yield "dtype", lambda row: row.dtype
    yield "elements", lambda row: size(row.numel)
    for provider in PROVIDERS:
        yield _figure("{} ms", provider, "ms")
    for name in OTHERS:
        yield f"{HEADS[name]} / this", lambda row, name=name: digits(row.speedup(name))  # type: ignore[misc]
    yield _figure("% of copy", PACK, "copy_fraction", 0.01)


def all_columns() -> Iterator[Column]:
    """The same, with spread, bandwidth, peak memory, host time and launches."""
    yield from short_columns()
    yield "20–80 % ms", _spread
    yield _figure("GB/s", PACK, "gbps")
    for provider in PROVIDERS:
        yield _figure("peak MiB {}", provider, "peak_bytes", MIB)
    for provider in (EAGER, PACK):
        yield _figure("host µs {}", provider, "host_us")
    for provider in (EAGER, PACK):
        yield _figure("launches {}", provider, "launches")


def _spread(row: Row) -> str:
    record = row.by.get(PACK)
    return f"{digits(record.ms_p20)}–{digits(record.ms_p80)}" if record and record.ms else NONE


def _figure(head: str, provider: str, field: str, unit: float = 1) -> Column:
    def cell(row: Row) -> str:
        value = getattr(row.by.get(provider), field, None)
        return digits(None if value is None else value / unit)

    return head.format(HEADS[provider]), cell


def table(found: Sequence[Row], columns: Iterable[Column]) -> tuple[list[str], list[list[str]]]:
    """Heads and lines; a column without a figure is left out."""
    made = [(head, [cell(row) for row in found]) for head, cell in columns]
    kept = [(head, cells) for head, cells in made if set(cells) != {NONE}]
    return [head for head, _ in kept], [list(line) for line in zip(*(cells for _, cells in kept))]
