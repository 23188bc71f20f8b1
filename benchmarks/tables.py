"""Records side by side: one row for an op, dtype, size and mode, with every provider in it; and Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Union

from benchmarks.records import Record, Stamp
from benchmarks.run import COMPILE, EAGER, PACK

MIB = 1 << 20
Cell = Union[str, None]


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


def by_stamp(records: Iterable[Record]) -> dict[Stamp, list[Record]]:
    found: dict[Stamp, list[Record]] = {}
    for record in records:
        found.setdefault(record.stamp, []).append(record)
    return found


def size(numel: int) -> str:
    """2²⁰ for 1048576; other numbers as they are."""
    if numel & (numel - 1) == 0:
        return "2" + str(numel.bit_length() - 1).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{numel:,}"


def number(value: float | None, form: str = ".3g") -> str:
    """A figure, or a dash where there is none."""
    return "–" if value is None else format(value, form)


def milliseconds(value: float | None) -> str:
    """Three digits, no exponent."""
    if value is None:
        return "–"
    return f"{value:.4f}" if value < 0.1 else f"{value:.3f}" if value < 10 else f"{value:.1f}"


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


COLUMNS = (
    "op", "dtype", "elements", "eager ms", "compile ms", "pack ms", "20–80 %", "eager / pack", "compile / pack", "GB/s",
    "of copy", "peak MiB eager", "pack", "host µs eager", "pack", "launches eager", "pack",
)  # fmt: skip


def cells(row: Row) -> list[str]:
    """A row of the full table."""
    pack, eager = row.by.get(PACK), row.by.get(EAGER)

    def of(record: Record | None, name: str, form: str = "", scale: float = 1.0) -> str:
        value = getattr(record, name) if record else None
        return "–" if value is None else format(value / scale if scale != 1 else value, form)

    spread = "–" if not pack or pack.ms is None else f"{milliseconds(pack.ms_p20)}–{milliseconds(pack.ms_p80)}"
    return [
        f"`{row.op}`",
        row.dtype,
        size(row.numel),
        *(milliseconds(row.ms(provider)) for provider in (EAGER, COMPILE, PACK)),
        spread,
        *(number(row.speedup(baseline), ".2f") for baseline in (EAGER, COMPILE)),
        of(pack, "gbps", ".4g"),
        of(pack, "copy_fraction", ".0%"),
        *(of(record, "peak_bytes", ".3g", MIB) for record in (eager, pack)),
        *(of(record, "host_us", ".1f") for record in (eager, pack)),
        *(of(record, "launches") for record in (eager, pack)),
    ]
