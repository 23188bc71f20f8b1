"""A report of result files: tables in Markdown, and pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import plots, tables
from benchmarks.records import Record, Stamp
from benchmarks.run import COPY
from benchmarks.tables import by_stamp, described, markdown, rows
from benchmarks.workloads import MODES

PICTURED = ("forward", "both")
NOT_A_GPU = "**Measured on a CPU. These figures say nothing about a GPU.**"


def write(records: Sequence[Record], folder: Path) -> list[Path]:
    """report.md with its pictures in `folder`; a further folder for each further stamp among the records."""
    made: list[Path] = []
    groups = by_stamp(records)
    for stamp, found in groups.items():
        place = folder if len(groups) == 1 else folder / f"{stamp.folder}-{stamp.commit}-torch{stamp.torch}"
        place.mkdir(parents=True, exist_ok=True)
        pictures = list(_draw(stamp, found, place))
        path = place / "report.md"
        path.write_text(text(stamp, found, [p.name for p in pictures if p.suffix == ".png"]), encoding="utf-8")
        made += [path, *pictures]
    return made


def _draw(stamp: Stamp, records: Sequence[Record], folder: Path) -> Iterator[Path]:
    title = described(stamp, [record.timestamp for record in records])
    title += "; a CPU: not GPU figures" if stamp.cuda is None else ""
    dtypes = list(dict.fromkeys(record.dtype for record in records))
    sizes = {record.numel for record in records}
    at = f"{tables.size(max(sizes))} elements, {title}"
    for mode in PICTURED:
        if len(sizes) > 1:
            for dtype in dtypes:
                if figure := plots.bandwidth(records, mode, dtype, title):
                    yield from plots.save(figure, folder / f"bandwidth-{mode}-{dtype}")
        for name, draw in (("speedup", plots.speedup), ("memory", plots.memory)):
            if figure := draw(records, mode, at):
                yield from plots.save(figure, folder / f"{name}-{mode}")


def text(stamp: Stamp, records: Sequence[Record], pictures: Sequence[str]) -> str:
    """The report in Markdown."""
    found = rows(records)
    failed = [record for record in records if record.error]
    parts = [f"# {stamp.device}", described(stamp, [record.timestamp for record in records]) + "."]
    if stamp.cuda is None:
        parts.append(NOT_A_GPU)
    parts.append(
        "GB/s is the op's own byte formula over the median time, the same bytes for every provider; *of copy* is that over a "
        "copy of the same dtype and size in the same run. *eager / pack* above 1: the pack is faster. Peak memory is beyond the "
        "inputs; in backward what the forward pass left counts. A dash: does not apply or was not measured."
    )
    copies = [record for record in records if record.op == COPY and record.gbps]
    if copies:
        lines = [[r.dtype, tables.size(r.numel), tables.milliseconds(r.ms), f"{r.gbps:.4g}"] for r in copies]
        parts += ["## Copy", markdown(("dtype", "elements", "ms", "GB/s"), lines)]
    for mode in MODES:
        here = [row for row in found if row.mode == mode]
        if here:
            parts += [f"## {mode.capitalize()}", markdown(tables.COLUMNS, map(tables.cells, here), left=2)]
    if failed:
        lines = [[f"`{r.op}`", r.dtype, tables.size(r.numel), r.mode, r.provider, _line(r.error)] for r in failed]
        parts += ["## Failed", markdown(("op", "dtype", "elements", "mode", "provider", "error"), lines, left=6)]
    parts += [f"![{name.removesuffix('.png')}]({name})" for name in pictures]
    return "\n\n".join(parts) + "\n"


def _line(error: str | None) -> str:
    return " ".join((error or "").split())[:200]
