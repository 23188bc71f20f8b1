"""What `run` and `compare` print."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.compare import Change, Comparison
from benchmarks.records import Record, Stamp
from benchmarks.run import COMPILE, EAGER, PACK, Plan
from benchmarks.tables import described, milliseconds, number, rows, size

console = Console(highlight=False)
if not console.is_terminal:
    console = Console(highlight=False, width=150)


def notice(plan: Plan, stamp: Stamp, path: Path) -> None:
    """Where and what, before anything is measured."""
    console.print(f"{stamp.device}, torch {stamp.torch}, commit {stamp.commit} → {path}", soft_wrap=True, markup=False)
    if plan.device.type == "cpu":
        console.print("No GPU: this measures the CPU path. These are not GPU numbers.", style="bold yellow")
    if COMPILE not in plan.providers:
        console.print(f"{COMPILE} is left out; --providers {','.join((*plan.providers, COMPILE))} measures it too.")


def summary(records: Sequence[Record]) -> Table:
    """Every op at the largest size: forward and backward where it has them."""
    found = rows(records)
    most = max((row.numel for row in found), default=0)
    both = {(row.op, row.dtype) for row in found if row.mode == "both"}
    stamp = records[-1].stamp
    title = described(stamp, [record.timestamp for record in records])
    table = Table(title=f"{size(most)} elements, {title}", box=SIMPLE_HEAD, padding=(0, 1))
    table.caption = (
        "a CPU: not GPU numbers" if stamp.cuda is None else "of copy: bandwidth over that of a copy in the same run"
    )
    for name in ("op", "dtype", "mode"):
        table.add_column(name, no_wrap=True)
    baselines = [name for name in (EAGER, COMPILE) if any(row.ms(name) for row in found)]
    ratios = [f"{name} / pack" for name in baselines]
    for name in (*(f"{name} ms" for name in baselines), "pack ms", *ratios, "GB/s", "of copy"):
        table.add_column(name, justify="right")
    for row in found:
        if row.numel != most or row.mode != ("both" if (row.op, row.dtype) in both else "forward"):
            continue
        pack = row.by.get(PACK)
        table.add_row(
            row.op,
            row.dtype,
            row.mode,
            *(milliseconds(row.ms(provider)) for provider in (*baselines, PACK)),
            *(number(row.speedup(baseline), ".2f") for baseline in baselines),
            number(pack.gbps if pack else None, ".4g"),
            number(pack.copy_fraction if pack else None, ".0%"),
        )
    return table


def comparison(result: Comparison, before: Sequence[Record], after: Sequence[Record], tolerance: float) -> None:
    """What moved, what is gone, what broke."""
    for name, found in (("before", before), ("after", after)):
        console.print(
            f"{name}: {described(found[0].stamp, [r.timestamp for r in found])}", soft_wrap=True, markup=False
        )
    moved = sorted((c for c in result.changes if c.verdict != "same"), key=lambda c: -c.ratio)
    if moved:
        table = Table(box=SIMPLE_HEAD, padding=(0, 1))
        for name in ("op", "dtype", "elements", "mode", "provider", "", "before ms", "after ms", "ratio"):
            table.add_column(name)
        for change in moved:
            table.add_row(*_moved(change), style="red" if change.verdict == "slower" else "green")
        console.print(table)
    for record in result.broken:
        console.print(f"fails now: {' '.join(map(str, record.key))}: {record.error}", style="red", markup=False)
    if result.gone:
        console.print(f"{len(result.gone)} cases were not measured again")
    console.print(
        f"{len(result.changes)} cases in both: {len(result.regressions)} slower and "
        f"{len(moved) - len(result.regressions)} faster by more than {tolerance:.0%} and the noise"
    )


def _moved(change: Change) -> list[str]:
    record = change.before
    return [
        record.op,
        record.dtype,
        size(record.numel),
        record.mode,
        record.provider,
        change.verdict,
        milliseconds(record.ms),
        milliseconds(change.after.ms),
        f"{change.ratio:.2f}",
    ]
