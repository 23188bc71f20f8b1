"""Command line: ``python -m benchmarks run | check | report | compare | compile | calls | figures | gpu``."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.run import Plan

PASSED, FAILED, CANNOT_RUN = 0, 1, 2  # exit codes
RESULTS = Path(__file__).parent / "results"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


def run(args: argparse.Namespace) -> int:
    """Measure every op: a record a line, then tables and pictures."""
    import torch
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from benchmarks import records, report
    from benchmarks.run import Bench, DeviceFailedError, measure
    from benchmarks.show import console, notice, summary
    from benchmarks.timing import timer

    plan = _plan(args)
    if plan.device.type == "cuda":
        torch.cuda.set_device(plan.device)
    else:
        torch.set_num_threads(args.threads)
    stamp = records.stamp(plan.device)
    try:
        if args.resume or args.out.suffix == ".jsonl":
            writer = records.Writer(args.resume or args.out, stamp, resume=bool(args.resume))
        else:
            writer = records.Writer.in_folder(args.out, stamp)
    except records.MixedRecordsError as error:
        return refuse(str(error))
    done = frozenset(record.key for record in writer.held) if args.resume else frozenset()
    notice(plan, stamp, writer.path)
    bench = Bench(plan.device, timer(plan.device), stamp, writer.write)
    deadline = time.monotonic() + args.limit if args.limit else math.inf
    bar = (
        TextColumn("{task.description:<44}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    made = []
    try:
        with Progress(*bar, console=console) as progress:
            task = progress.add_task("", total=len(plan) - len(done))
            for record in measure(plan, bench, done, deadline):
                made.append(record)
                progress.update(task, advance=1, description=f"{record.op} {record.dtype} {record.provider}"[:44])
                if record.error:
                    progress.console.print(
                        f"failed: {' '.join(map(str, record.key))}: {record.error}", style="red", markup=False
                    )
    except DeviceFailedError:
        if not made:
            return refuse("the device cannot even copy")
        left = [] if deadline == math.inf else ["--limit", str(max(1, int(deadline - time.monotonic())))]
        print("The device failed; going on in a new process.", flush=True)
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks", *_resumed(args, writer.path), *left])
    except KeyboardInterrupt:
        print(f"Interrupted; {len(made)} records are in {writer.path}")
        return 130
    if not made:
        return refuse("nothing to measure: no op takes these dtypes and modes")
    everything = records.read(writer.path)
    console.print(summary(everything))
    failed = [record for record in made if record.error]
    if not args.no_report:
        folder = writer.path.with_suffix("")
        report.write(everything, folder)
        console.print(f"{writer.path}, {folder / 'report.md'} and pictures", soft_wrap=True, markup=False)
    console.print(f"{len(made)} cases measured, {len(failed)} of them failed")
    return FAILED if failed else PASSED


def _resumed(args: argparse.Namespace, path: Path) -> list[str]:
    """The arguments of `run` that go on with a file."""
    kept = ["run", "--resume", str(path), "--device", args.device, "--threads", str(args.threads)]
    for name in ("ops", "dtypes", "sizes", "modes", "providers"):
        if getattr(args, name):
            kept += [f"--{name}", ",".join(map(str, getattr(args, name)))]
    return kept + ["--full"] * args.full + ["--no-report"] * args.no_report


def check(args: argparse.Namespace) -> int:
    """Run each op of the pack once, forward and backward, and hold it to its reference; time nothing."""
    from benchmarks import workloads

    plan = _plan(args)
    wrong = count = 0
    for _, numel, found in plan.groups():
        for workload in found:
            for mode in plan.modes_of(workload):
                count += 1
                try:
                    workloads.check(workload, workload.pack, mode, strict=True)
                except Exception as error:
                    wrong += 1
                    print(f"{workload.name} {workload.dtype} {numel} {mode}: {type(error).__name__}: {error}")
    print(f"{count - wrong} of {count} calls agree with their reference")
    return FAILED if wrong or not count else PASSED


def report(args: argparse.Namespace) -> int:
    """Tables and pictures of result files."""
    from benchmarks import records
    from benchmarks import report as reports

    paths = [file for path in args.results for file in records.files(path)] or records.newest()
    if not paths:
        return refuse("no result files; python -m benchmarks run makes one")
    try:
        if args.out:
            made = reports.write(records.read(paths), args.out)
        else:
            made = [file for path in paths for file in reports.write(records.read(path), path.with_suffix(""))]
    except (OSError, ValueError) as error:
        return refuse(str(error))
    print("\n".join(map(str, made)))
    return PASSED


def compare(args: argparse.Namespace) -> int:
    """Two result files: what is slower in the second; exit code 1 if anything is, or fails there alone."""
    from benchmarks import records
    from benchmarks.compare import compare as compared
    from benchmarks.show import comparison

    try:
        before, after = (records.read(records.files(path)) for path in (args.before, args.after))
    except (OSError, ValueError) as error:
        return refuse(str(error))
    result = compared(before, after, args.tolerance)
    if not result.changes and not result.broken:
        return refuse(f"{args.before} and {args.after} have no case in common")
    comparison(result, before, after, args.tolerance)
    return PASSED if result.passes else FAILED


def compile(args: argparse.Namespace) -> int:
    """Compile every kernel for every target, with no GPU: registers, spills, vector widths, instructions, a roofline."""
    if find_spec("triton") is None:
        return refuse("the compile report needs Triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return refuse("TRITON_INTERPRET=1 leaves nothing to compile; unset it")
    from rich.progress import track

    from benchmarks import compiled
    from benchmarks.roofline import GPUS

    if unknown := [target for target in args.targets if target not in TARGETS]:
        return refuse(f"--targets: expected some of {', '.join(TARGETS)}; got {', '.join(unknown)}")
    compilation = compiled.Compilation(args.targets, args.dtypes)
    for _ in track(compilation.run(args.jobs), "Compiling", total=len(compilation.jobs)):
        pass
    lines = compilation.lines()
    for path in compiled.write(lines, args.out, GPUS[args.gpu]):
        print(path)
    spilled = [f"{line.target} {line.op} {line.kernel} {line.dtype}" for line in lines if line.spills]
    print(f"{len(lines)} kernels, {len(spilled)} with spills: {', '.join(spilled) or 'none'}")
    return FAILED if spilled else PASSED


def calls(args: argparse.Namespace) -> int:
    """Host time of calls on tiny inputs, beside eager torch and a bare ``kernel[grid]``; without a GPU on a stub driver."""
    if find_spec("triton") is None:
        return refuse("the launches measured need Triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return refuse("TRITON_INTERPRET=1 leaves no launch to measure; unset it")
    import torch
    from rich.progress import track

    from benchmarks import calls as measured
    from benchmarks import records
    from triton_thresh.registry import OPS

    if unknown := [name for name in args.ops or () if name not in OPS]:
        return refuse(f"--ops: expected some of {', '.join(OPS)}; got {', '.join(unknown)}")
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stamp = records.stamp(device)
    made = [
        record for name in track(args.ops or list(OPS), "Measuring") for record in measured.measure(name, device, stamp)
    ]
    print("\n".join(measured.table(made)))
    for path in measured.write(made, args.out / stamp.folder, f"{records.now()[:10]}-{stamp.commit}"):
        print(path)
    return PASSED


def figures(args: argparse.Namespace) -> int:
    """The README's figures, from the committed result files."""
    from benchmarks.readme import figures as made
    from benchmarks.readme import updated

    if args.write:
        args.write.write_text(updated(args.write.read_text()))
    else:
        print(made())
    return PASSED


def gpu(args: argparse.Namespace) -> int:
    """Everything a GPU settles in one go, the most telling first, within a time limit."""
    from benchmarks.gpu import run_all

    return run_all(args.limit, args.out, rehearse=args.rehearse)


def refuse(message: str) -> int:
    print(f"benchmarks: {message}", file=sys.stderr)
    return CANNOT_RUN


def _plan(args: argparse.Namespace) -> Plan:
    from benchmarks.run import plan

    try:
        return plan(args.device, args.full, args.ops, args.dtypes, args.sizes, args.modes, args.providers)
    except ValueError as error:
        raise SystemExit(refuse(str(error))) from None


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _sizes(text: str) -> tuple[int, ...]:
    """ "10,20" or "10-20": exponents of 2."""
    found: list[int] = []
    for part in _names(text):
        low, _, high = part.partition("-")
        found += range(int(low), int(high or low) + 1)
    if not found or not all(0 <= size <= 40 for size in found):
        raise argparse.ArgumentTypeError(f"expected exponents of 2 such as 10,20 or 10-20, got {text!r}")
    return tuple(dict.fromkeys(found))


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def _chosen(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one"
    )
    command.add_argument("--ops", type=_names, metavar="A,B", help="names of ops (default: every op of the registry)")
    command.add_argument("--dtypes", type=_names, metavar="A,B", help="float32, bfloat16, float16, float64")
    command.add_argument("--sizes", type=_sizes, metavar="10,20-24", help="exponents of 2 (default: a telling few)")
    command.add_argument("--modes", type=_names, metavar="A,B", help="forward, backward, both (default: all)")
    command.add_argument(
        "--providers",
        type=_names,
        metavar="A,B",
        help="eager, torch.compile, triton_thresh (default: all; on a CPU not torch.compile)",
    )
    command.add_argument("--full", action="store_true", help="every size from 2^0 to 2^30, every dtype, every provider")


def main(argv: list[str] | None = None) -> int:
    """Parse the arguments and run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("run", help=run.__doc__, description=run.__doc__)
    _chosen(command)
    command.add_argument(
        "--out",
        type=Path,
        default=RESULTS,
        help="folder of results, or a .jsonl file to write or append to (default: %(default)s)",
    )
    command.add_argument(
        "--threads",
        type=int,
        default=1,
        help="on a CPU (default: 1, since a thread without a core of its own spoils the figures)",
    )
    command.add_argument("--resume", type=Path, metavar="FILE", help="go on with a run that was cut off")
    command.add_argument("--limit", type=_positive, metavar="SECONDS", help="start no case after so long")
    command.add_argument("--no-report", action="store_true", help="records alone, no tables and pictures")
    command.set_defaults(run=run)
    command = commands.add_parser("check", help=check.__doc__, description=check.__doc__)
    _chosen(command)
    command.set_defaults(run=check)
    command = commands.add_parser("report", help=report.__doc__, description=report.__doc__)
    command.add_argument(
        "results", type=Path, nargs="*", metavar="RESULTS", help="files or folders (default: each device's newest)"
    )
    command.add_argument(
        "--out", type=Path, help="folder for one report of all (default: one beside each file, under its name)"
    )
    command.set_defaults(run=report)
    command = commands.add_parser("compare", help=compare.__doc__, description=compare.__doc__)
    command.add_argument("before", type=Path)
    command.add_argument("after", type=Path)
    command.add_argument(
        "--tolerance", type=_positive, default=0.05, help="of the median, beside the noise (default: %(default)s)"
    )
    command.set_defaults(run=compare)
    command = commands.add_parser("compile", help=compile.__doc__, description=compile.__doc__)
    command.add_argument("--targets", type=_names, default=TARGETS, metavar="A,B", help=f"default: {','.join(TARGETS)}")
    command.add_argument(
        "--dtypes", type=_names, default=("fp32", "bf16", "fp16"), metavar="A,B", help="fp32, bf16, fp16, fp64"
    )
    command.add_argument(
        "--gpu", choices=("H100", "H200"), default="H200", help="whose times are modelled (default: %(default)s)"
    )
    command.add_argument("--jobs", type=int, help="processes (default: one a core)")
    command.add_argument("--out", type=Path, default=RESULTS / "compile", help="folder (default: %(default)s)")
    command.set_defaults(run=compile)
    command = commands.add_parser("calls", help=calls.__doc__, description=calls.__doc__)
    command.add_argument("--ops", type=_names, metavar="A,B", help="names of ops (default: every op of the registry)")
    command.add_argument("--out", type=Path, default=RESULTS / "calls", help="folder (default: %(default)s)")
    command.set_defaults(run=calls)
    command = commands.add_parser("figures", help=figures.__doc__, description=figures.__doc__)
    command.add_argument("--write", type=Path, metavar="README")
    command.set_defaults(run=figures)
    command = commands.add_parser("gpu", help=gpu.__doc__, description=gpu.__doc__)
    command.add_argument(
        "--limit", type=_positive, default=1800, metavar="SECONDS", help="for all steps (default: %(default)s)"
    )
    command.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder (default: %(default)s)")
    command.add_argument(
        "--rehearse",
        action="store_true",
        help="without a GPU: the same steps on a CPU and a pretended GPU, where they can",
    )
    command.set_defaults(run=gpu)
    args = parser.parse_args(argv)
    if missing := [name for name in ("rich", "matplotlib") if find_spec(name) is None]:
        return refuse(f"{' and '.join(missing)} missing: pip install {' '.join(missing)}")
    return int(args.run(args))


if __name__ == "__main__":
    sys.exit(main())
