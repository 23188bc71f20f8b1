"""A report of result files: tables in Markdown, and pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import plots, tables
from benchmarks.records import Record, Stamp
from benchmarks.run import COPY
from benchmarks.tables import described, markdown, rows
from benchmarks.workloads import MODES

NOT_A_GPU = "**Measured on a CPU. These figures say nothing about a GPU.**"
EXPLANATION = (
    "*eager*: the formula by hand in eager PyTorch. *torch.compile*: the same formula compiled; its backward is autograd's. "
    "*torch.compile+grad*: `torch.compile(torch.func.grad_and_value(formula))`, loss and gradient in one graph. A ratio above 1: "
    "this package is faster. GB/s is the op's own byte formula over the median time; *of copy* is that over a copy of the same "
    "dtype and size in the same run. Peak memory is beyond the inputs; in backward what the forward pass left counts. A dash: "
    "does not apply, or was not measured. Two digits, since the third differs from run to run."
)


def write(records: Sequence[Record], folder: Path) -> list[Path]:
    """report.md, with pictures, of the records of one stamp."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp = records[0].stamp
    pictures = list(_draw(stamp, records, folder))
    path = folder / "report.md"
    path.write_text(text(stamp, records, [p.name for p in pictures if p.suffix == ".png"]), encoding="utf-8")
    return [path, *pictures]


def _draw(stamp: Stamp, records: Sequence[Record], folder: Path) -> Iterator[Path]:
    note = described(stamp, [record.timestamp for record in records])
    note += ". A CPU: these are not GPU figures" if stamp.cuda is None else ""
    found = tables.steps(rows(records))
    if not found:
        return
    largest, smallest = tables.fullest(found), min(row.numel for row in found)
    for name, draw, numel in (
        ("speedup", plots.speedup, largest),
        ("speedup-small", plots.speedup, smallest),
        ("share-of-copy", plots.share_of_copy, largest),
        ("memory", plots.memory, largest),
    ):
        shown = [row for row in found if row.numel == numel]
        again = name == "speedup-small" and smallest == largest
        if figure := None if again else draw(shown, f"{tables.size(numel)} elements. {note}"):
            yield from plots.save(figure, folder / name)


def text(stamp: Stamp, records: Sequence[Record], pictures: Sequence[str]) -> str:
    """The report in Markdown."""
    found = rows(records)
    failed = [record for record in records if record.error]
    parts = [f"# {stamp.device}", described(stamp, [record.timestamp for record in records]) + "."]
    if stamp.cuda is None:
        parts.append(NOT_A_GPU)
    parts += [EXPLANATION, *(f"![{name.removesuffix('.png')}]({name})" for name in pictures)]
    copies = [record for record in records if record.op == COPY and record.gbps]
    if copies:
        lines = [[r.dtype, tables.size(r.numel), tables.digits(r.ms), tables.digits(r.gbps)] for r in copies]
        parts += ["## Copy", markdown(("dtype", "elements", "ms", "GB/s"), lines)]
    for mode in MODES:
        here = [row for row in found if row.mode == mode]
        if here:
            parts += [f"## {mode.capitalize()}", markdown(*tables.table(here, tables.all_columns()), left=2)]
    if failed:
        lines = [[f"`{r.op}`", r.dtype, tables.size(r.numel), r.mode, r.provider, _line(r.error)] for r in failed]
        parts += ["## Failed", markdown(("op", "dtype", "elements", "mode", "provider", "error"), lines, left=6)]
    return "\n\n".join(parts) + "\n"


def _line(error: str | None) -> str:
    return " ".join((error or "").split())[:200]
