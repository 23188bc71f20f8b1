"""Command line: ``python -m benchmarks``."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

if missing := [name for name in ("typer", "rich", "matplotlib") if find_spec(name) is None]:
    raise SystemExit(f"The benchmarks need {', '.join(missing)}: pip install {' '.join(missing)}")

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import track as tracked
from rich.table import Table

from benchmarks import records, tables, workloads
from benchmarks.run import DTYPES, PROVIDERS, Bench, DeviceFailedError, Plan, measure
from benchmarks.run import plan as planned
from benchmarks.timing import timer
from triton_thresh.cli import Dtypes, OpNames, Sizes, exponents, names, new_app, refuse, split
from triton_thresh.cli import run as run_app

if TYPE_CHECKING:
    from benchmarks.compare import Runs
    from benchmarks.records import Record

FAILED, INTERRUPTED = 1, 130  # exit codes
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}

console = Console(highlight=False)
if not console.is_terminal:
    console = Console(highlight=False, width=150)

app = new_app(
    "Measure, count and compile every op of triton_thresh.\n\nResults go to bench-results/, which git ignores; with --commit to "
    "benchmarks/results/, from which the documentation is made.",
    completes=False,
)

Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto is a GPU if there is one.")]
Modes = Annotated[list[str] | None, names("Modes", lambda: workloads.MODES, "forward", "both")]
Providers = Annotated[list[str] | None, names("What is measured", lambda: PROVIDERS, "eager", "triton_thresh")]
Full = Annotated[bool, typer.Option("--full", help="Every size from 2^0 to 2^30, and float16 too.")]
Commit = Annotated[bool, typer.Option("--commit", help="Use benchmarks/results/, which git tracks.")]
Out = Annotated[Path | None, typer.Option(help="Another folder, for instance /tmp/results.")]


def _folder(out: Path | None, commit: bool) -> Path:
    return out or (records.RESULTS if commit else records.LOCAL)


@contextmanager
def _refusing() -> Iterator[None]:
    """Says in a line what is wrong with files and options."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise refuse(str(error)) from None


def _needs_compiler(what: str) -> None:
    if find_spec("triton") is None:
        raise refuse(f"{what} needs Triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise refuse(f"{what} needs Triton's compiler, which TRITON_INTERPRET=1 replaces; unset it")


@app.command()
def run(
    ops: OpNames = None,
    dtypes: Dtypes = None,
    sizes: Sizes = None,
    modes: Modes = None,
    providers: Providers = None,
    device: Device = "auto",
    full: Full = False,
    runs: Annotated[int, typer.Option(min=1, help="Measure everything so often, a file each, for instance 3.")] = 1,
    threads: Annotated[
        int,
        typer.Option(min=1, help="On a CPU, for instance 4. A thread without a core of its own spoils the figures."),
    ] = 1,
    limit: Annotated[
        float | None, typer.Option(min=1, help="Start no case after so many seconds, for instance 600.")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Go on with a run that was cut off, for instance a.jsonl."),
    ] = None,
    report: Annotated[bool, typer.Option(help="Draw pictures and write tables beside the records.")] = True,
    out: Out = None,
    commit: Commit = False,
) -> None:
    """Measure every op against eager torch and torch.compile.

    Without options: on a CPU float32 at 2^20, 2^16, 2^12 and 2^8 elements, forward alone and with backward; on a GPU float32 and
    bfloat16 up to 2^28, and backward alone too. Each result is held to its formula before it is timed.
    """
    with _refusing():
        plan = planned(device, full, ops, dtypes, exponents(sizes), modes, providers)
    if plan.device.type == "cpu":
        torch.set_num_threads(threads)
    stamp = records.stamp(plan.device)
    clock = timer(plan.device)
    deadline = time.monotonic() + limit if limit else math.inf
    failed = 0
    for number in range(runs):
        if number and time.monotonic() > deadline:
            break
        with _refusing():
            if resume and number == 0:
                writer = records.Writer(resume, stamp, resume=True)
            else:
                writer = records.Writer.in_folder(_folder(out, commit), stamp)
        console.print(f"{stamp.device}, torch {stamp.torch}, commit {stamp.commit} → {writer.path}", soft_wrap=True)
        if stamp.cuda is None:
            console.print("No GPU: this measures the CPU path. These are not GPU numbers.", style="bold yellow")
        made: list[Record] = []
        try:
            _measure(plan, Bench(plan.device, clock, stamp, writer.write), writer.held, deadline, made)
        except DeviceFailedError as error:
            if not made:
                raise refuse(f"the device cannot even copy: {error}") from None
            print("The device failed; going on in a new process.", flush=True)
            options = {"--resume": writer.path, "--runs": runs - number}
            options |= {"--limit": max(1, int(deadline - time.monotonic()))} if limit else {}
            again = [part for option, value in options.items() for part in (option, str(value))]
            os.execv(sys.executable, [sys.executable, "-m", "benchmarks", *sys.argv[1:], *again])
        except KeyboardInterrupt:
            print(f"Interrupted; what was measured is in {writer.path}")
            raise typer.Exit(INTERRUPTED) from None
        if not made:
            raise refuse("nothing to measure: no op takes these dtypes and modes")
        everything = records.read(writer.path)
        _summarize(everything)
        failed += sum(record.error is not None for record in made)
        if report:
            from benchmarks import report as reports

            reports.write(everything, writer.path.with_suffix(""))
            console.print(f"{writer.path.with_suffix('') / 'report.md'}, with pictures", soft_wrap=True)
    if failed:
        console.print(f"{failed} cases failed", style="red")
        raise typer.Exit(FAILED)


def _measure(plan: Plan, bench: Bench, held: list[Record], deadline: float, made: list[Record]) -> None:
    """Add the records of a run to `made`, while a bar shows its progress."""
    done = frozenset(record.key for record in held)
    bar = (TextColumn("{task.description:<44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*bar, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("", total=len(plan) - len(done))
        for record in measure(plan, bench, done, deadline):
            made.append(record)
            progress.update(task, advance=1, description=f"{record.op} {record.dtype} {record.provider}"[:44])
            if record.error:
                words = f"failed: {' '.join(map(str, record.key))}: {record.error}"
                progress.console.print(words, style="red", markup=False)


def _summarize(found: list[Record]) -> None:
    """Training steps at the largest size."""
    rows = tables.steps(tables.rows(found))
    most = max(row.numel for row in rows)
    stamp = tables.described(found[-1].stamp, [record.timestamp for record in found])
    heads, lines = tables.table([row for row in rows if row.numel == most], tables.short_columns())
    note = ". A CPU: not GPU numbers" if found[-1].on_cpu else ""
    _show(heads, lines, title=f"Forward and backward. {stamp}{note}", left=2)


def _show(heads: list[str], lines: list[list[str]], title: str | None = None, left: int = 1) -> None:
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1))
    for place, head in enumerate(heads):
        table.add_column(head, justify="left" if place < left else "right", no_wrap=place < left)
    for line in lines:
        table.add_row(*line, style={"slower": "red", "faster": "green"}.get(line[5] if len(line) > 5 else ""))
    console.print(table)


@app.command()
def check(
    ops: OpNames = None,
    dtypes: Dtypes = None,
    sizes: Sizes = None,
    modes: Modes = None,
    device: Device = "auto",
    full: Full = False,
) -> None:
    """Hold each op to its reference once; time nothing."""
    with _refusing():
        plan = planned(device, full, ops, dtypes, exponents(sizes), modes, PROVIDERS[-1:])
    wrong = count = 0
    for _, numel, found in plan.groups():
        for workload in found:
            for mode, _ in plan.cases(workload):
                count += 1
                try:
                    workloads.check(workload, workload.pack, mode, strict=True)
                except Exception as error:
                    wrong += 1
                    print(f"{workload.name} {workload.dtype} {numel} {mode}: {type(error).__name__}: {error}")
    print(f"{count - wrong} of {count} calls agree with their reference")
    raise typer.Exit(FAILED if wrong or not count else 0)


@app.command()
def report(
    results: Annotated[
        list[Path] | None,
        typer.Argument(help="Files or folders, for instance a.jsonl (each device's newest if not given)."),
    ] = None,
    commit: Commit = False,
) -> None:
    """Write tables and draw pictures from result files."""
    from benchmarks import compiled, plots, traffic
    from benchmarks import report as reports

    folder = _folder(None, commit)
    paths = [file for path in results or () for file in records.files(path)] or records.newest(folder)
    if not paths:
        raise refuse("no result files; python -m benchmarks run makes one")
    made: list[Path] = []
    with _refusing():
        for path in paths:
            made += reports.write(records.read(path), path.with_suffix(""))
        for path in [] if results else folder.glob("compile/*/report.jsonl"):
            made += plots.save(compiled.picture(compiled.read(path)), path.with_name("roofline"))
        for path in [] if results else folder.glob("bytes.json"):
            found = [line for line in traffic.read(path) if line.dtype == "float32"]
            if figure := plots.bytes_moved(found, f"torch {found[0].torch}"):
                made += plots.save(figure, path.with_suffix(""))
    print("\n".join(map(str, made)))


@app.command()
def compare(
    before: Annotated[str, typer.Argument(help="Runs: files or folders, several by commas, for instance before.")],
    after: Annotated[str, typer.Argument(help="The other side, for instance a.jsonl,b.jsonl.")],
    tolerance: Annotated[float, typer.Option(min=0, help="What counts beside the noise, for instance 0.1.")] = 0.05,
) -> None:
    """Say what became slower, beyond the noise between runs.

    Each side needs two runs or more, on the same device. The exit code is 1 if anything of this package became slower, or
    fails now.
    """
    from benchmarks.compare import HEADS
    from benchmarks.compare import compare as compared

    with _refusing():
        one, other = _runs(before), _runs(after)
        found = compared(one, other, tolerance)
    for name, side in (("before", one), ("after", other)):
        stamps = ", ".join(dict.fromkeys(tables.described(run[0].stamp, [run[0].timestamp]) for run in side))
        console.print(f"{name}: {len(side)} runs, {stamps}", soft_wrap=True, markup=False)
    moved = [change for change in found.changes if change.verdict != "same"]
    if moved:
        _show(list(HEADS), [change.cells for change in sorted(moved, key=lambda change: -change.ratio)], left=6)
    for record in found.broken:
        console.print(f"fails now: {' '.join(map(str, record.key))}: {record.error}", style="red", markup=False)
    console.print(
        f"{len(found.changes)} cases, noise between runs {found.noise:.0%} (median). {len(found.regressions)} of this package "
        f"are slower beyond their noise and {tolerance:.0%}. {found.too_few} cases have too few runs on a side; "
        f"{len(found.gone)} were not measured again."
    )
    raise typer.Exit(FAILED if found.regressions or found.broken else 0)


def _runs(side: str) -> Runs:
    """The runs of a side, each of one file."""
    files = [file for path in split([side]) for file in records.files(Path(path))]
    if not files:
        raise ValueError(f"{side}: no result files")
    return [records.read(file) for file in files]


@app.command(name="compile")
def compile_(
    targets: Annotated[list[str] | None, names("Architectures", lambda: TARGETS, "sm_90", "gfx942")] = None,
    dtypes: Dtypes = None,
    gpu: Annotated[Literal["H100", "H200"], typer.Option(help="Whose times are modelled.")] = "H200",
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Processes, for instance 2 (one for each core if not given).")
    ] = None,
    out: Out = None,
    commit: Commit = False,
) -> None:
    """Compile every kernel for four GPUs, with none at hand.

    The report has registers, spills, vector widths, instructions, and a roofline. The exit code is 1 if a kernel spills.
    """
    _needs_compiler("the compile report")
    from benchmarks import compiled
    from benchmarks.roofline import GPUS

    compilation = compiled.Compilation(targets or TARGETS, [SHORT[dtype] for dtype in dtypes or DTYPES])
    for _ in tracked(compilation.run(jobs), "Compiling", total=len(compilation.jobs)):
        pass
    lines = compilation.lines()
    for path in compiled.write(lines, _folder(out, commit) / "compile", GPUS[gpu]):
        print(path)
    spilled = [f"{line.target} {line.op} {line.kernel} {line.dtype}" for line in lines if line.spills]
    print(f"{len(lines)} kernels, {len(spilled)} with spills: {', '.join(spilled) or 'none'}")
    raise typer.Exit(FAILED if spilled else 0)


@app.command()
def calls(ops: OpNames = None, out: Out = None, commit: Commit = False) -> None:
    """Measure the host's time of calls on tiny inputs.

    Beside them stand eager torch and a bare kernel[grid]; without a GPU a stub takes the driver's place.
    """
    _needs_compiler("the time of a launch")
    from benchmarks import calls as measured
    from triton_thresh.registry import OPS

    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stamp = records.stamp(device)
    made = [
        record for name in tracked(ops or list(OPS), "Measuring") for record in measured.measure(name, device, stamp)
    ]
    print("\n".join(measured.table(made)))
    folder = _folder(out, commit) / "calls" / stamp.folder
    for path in measured.write(made, folder, f"{records.now()[:10]}-{stamp.commit}"):
        print(path)


@app.command(name="bytes")
def bytes_(ops: OpNames = None, dtypes: Dtypes = None, out: Out = None, commit: Commit = False) -> None:
    """Count the bytes of a training step: eager, compiled, this."""
    from benchmarks import traffic

    torch.set_num_threads(1)
    found = list(tracked(traffic.count_all(ops or (), dtypes or DTYPES), "Counting"))
    heads = ["op", "dtype", "eager", "compiled", "compiled+grad", "this"]
    figures = ((one.eager, one.compiled, one.compiled_grad, one.this) for one in found)
    _show(
        heads,
        [[one.op, one.dtype, *(tables.digits(value, 3) for value in line)] for one, line in zip(found, figures)],
        left=2,
    )
    path = _folder(out, commit) / "bytes.json"
    traffic.write(found, path)
    print(path)


@app.command()
def gpu(
    limit: Annotated[float, typer.Option(min=1, help="Seconds for all steps, for instance 600.")] = 1800,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder, for instance /tmp/gpu.")] = Path("gpu-results"),
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Without a GPU: the same steps on a CPU and a pretended GPU.")
    ] = False,
) -> None:
    """Run everything a GPU settles, the most telling first.

    Tests, benchmark, sanitizer, profiler and tuning, within a time limit.
    """
    from benchmarks.gpu import run_all

    raise typer.Exit(run_all(limit, out, rehearse=rehearse))


def main(arguments: list[str] | None = None) -> int:
    """Run a command, and return its exit code."""
    return run_app(app, "python -m benchmarks", arguments)


if __name__ == "__main__":
    sys.exit(main())
