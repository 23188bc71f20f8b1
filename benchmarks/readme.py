"""The README's figures: the newest committed result file of each device, at its largest size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks import records, tables
from benchmarks.records import RESULTS
from benchmarks.run import COMPILE, EAGER, PACK
from benchmarks.tables import described, markdown, milliseconds, number, rows

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def figures(folder: Path = RESULTS) -> str:
    """A table for each device, GPUs first, with device, date, commit and versions above it."""
    paths = sorted(records.newest(folder), key=lambda path: records.read(path)[0].on_cpu)
    return "\n\n".join(part for path in paths for part in _device(path, folder))


def _device(path: Path, folder: Path) -> Iterator[str]:
    found = records.read(path)
    stamp = found[0].stamp
    everything = rows(found)
    most = max(row.numel for row in everything)
    kept = [row for row in everything if row.mode == "both" and row.numel == most]
    note = " **CPU figures, not GPU figures.**" if stamp.cuda is None else ""
    yield (
        f"{described(stamp, [record.timestamp for record in found])}: forward and backward at {tables.size(most)} elements, "
        f"medians in ms.{note} [All of it](benchmarks/results/{(path.with_suffix('') / 'report.md').relative_to(folder)})."
    )
    baselines = [name for name in (EAGER, COMPILE) if any(row.ms(name) for row in kept)]
    heads = ["op", "dtype", *baselines, PACK, *(f"{name} / {PACK}" for name in baselines)]
    lines = [
        [
            f"`{row.op}`",
            row.dtype,
            *(milliseconds(row.ms(name)) for name in (*baselines, PACK)),
            *(number(row.speedup(name), ".2f") for name in baselines),
        ]
        for row in kept
    ]
    yield markdown(heads, lines, left=2)


def updated(readme: str, folder: Path = RESULTS) -> str:
    """A README with the figures between its two markers made anew."""
    head, rest = readme.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{figures(folder)}\n{END}{tail}"
