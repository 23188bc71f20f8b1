"""Everything a GPU can settle in one go: steps in order of worth, each a process of its own with a share of the time left.

After every step summary.json is written anew, so that a run that is cut off keeps what it had.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from benchmarks import records

NO_GPU = "no GPU: torch.cuda.is_available() is false"
SECONDS = "{seconds}"
MARGIN = 0.85  # of its time is what a step is told to keep to
LEAST = 5.0  # seconds left under which no step is started
GRACE = 10.0  # seconds between asking a step to end and ending it
ALONE = "hardshrink,threshold_mse_loss,threshold_bce_loss"  # what ncu looks at
METRICS = ",".join(
    (
        "gpu__time_duration.sum",
        "dram__bytes_read.sum",
        "dram__bytes_write.sum",
        "dram__throughput.avg.pct_of_peak_sustained_elapsed",
        "sm__inst_executed.sum",
        "smsp__issue_active.avg.pct_of_peak_sustained_active",
    )
)


@dataclass(frozen=True)
class Step:
    """A command; `share` of the time then left is the most it may take, `needs` why it cannot run here (None: it can).

    SECONDS in the command stands for the most it should take by itself.
    """

    name: str
    command: Sequence[str]
    share: float
    needs: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    finding: int | None = None  # an exit code that says something of the GPU, not of the step
    instead: str = ""  # of a rehearsal: what stands in for the GPU


@dataclass
class Outcome:
    """The outcome of a step. status: passed, failed (with its exit code), timed out, not run."""

    name: str
    status: str
    seconds: float = 0.0
    code: int | None = None
    why: str = ""
    log: str = ""
    command: str = ""


def steps(out: Path, rehearse: bool) -> list[Step]:
    """The steps in order of worth. A rehearsal runs on a CPU what it can, few cases, and tunes a pretended GPU."""
    python = [sys.executable, "-m"]
    no_gpu = None if torch.cuda.is_available() else NO_GPU
    benched = None if rehearse else no_gpu
    few = ["--ops", "hardshrink,exceedance_mse_loss", "--sizes", "10,16", "--dtypes", "float32"] if rehearse else []
    before, after = out / "before", out / "after"
    untuned = {"TRITON_THRESH_AUTOTUNE": "0"}
    tuned = {"TRITON_THRESH_CACHE_DIR": str(out / "tuned")}
    # every kind of operand of every kernel once, with no allocator between the kernels and the memory they may touch
    cases = [
        *python,
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/gpu/test_host.py",
        "-k",
        "test_the_host_never_waits",
    ]
    watched = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    pretend = [*python, "tests.rehearsal"] if rehearse else python
    run = [*python, "benchmarks", "run", "--runs", "2", "--limit", SECONDS]
    on_cpu, pretended = ("on a CPU", "on a stub driver: kernels compiled, not launched") if rehearse else ("", "")
    searches = ["--sizes", "10", "--dtypes", "bfloat16", "--ops", "hardshrink"] if rehearse else []
    sanitizer, ncu = (_missing(no_gpu, tool) for tool in ("compute-sanitizer", "ncu"))
    sanitize = ["compute-sanitizer", "--error-exitcode", "9", "--tool"]
    profile = ["ncu", "--csv", "--metrics", METRICS, "--kernel-name", f"regex:^({_kernels()})$"]
    large = ["benchmarks", "check", "--sizes", "26", "--dtypes", "bfloat16", "--modes", "forward,both", "--ops", ALONE]
    return [
        Step("versions", [*python, "triton_thresh", "info"], 0.1),
        Step("gpu tests", [*python, "pytest", "-q", "-m", "gpu", "tests"], 0.35, no_gpu),
        Step("benchmark", [*run, "--out", str(before), *few], 0.45, benched, untuned, instead=on_cpu),
        Step("calls", [*python, "benchmarks", "calls", "--out", str(out), *few[:2]], 0.1, benched),
        Step("selection", [*python, "benchmarks.selection", "--out", str(out)], 0.05, no_gpu),
        Step("linear loss", [*python, "benchmarks.linear", "--out", str(out)], 0.2, no_gpu),
        Step("memcheck", [*sanitize, "memcheck", *cases], 0.25, sanitizer, watched),
        Step("racecheck", [*sanitize, "racecheck", *cases], 0.25, sanitizer, watched),
        Step("ncu", [*profile, *python, *large], 0.25, ncu, untuned),
        Step(
            "tune",
            [*pretend, "triton_thresh", "tune", "--out", str(out / "table.json"), *searches],
            0.5,
            benched,
            tuned,
            instead=pretended,
        ),
        Step("benchmark, tuned", [*run, "--out", str(after), *few], 0.9, benched, tuned, instead=on_cpu),
        Step("compare", [*python, "benchmarks", "compare", str(before), str(after)], 1.0, benched, finding=1),
    ]


def _kernels() -> str:
    """The names of the pack's kernels, for a regular expression; "none" where Triton is missing."""
    try:
        from benchmarks.cases import cases
    except ImportError:
        return "none"
    return "|".join(sorted({case.jit.fn.__name__ for case in cases(("bf16",))}))


def _missing(no_gpu: str | None, tool: str) -> str | None:
    return no_gpu or (None if shutil.which(tool) else f"{tool} is not on the PATH")


def run_all(limit: float, out: Path, *, rehearse: bool = False) -> int:
    """Run the steps within the limit, in a new folder of `out`; exit code 1 if one that ran failed or ran out of time."""
    out = out.resolve() / records.now()[:19].replace(":", "-")
    out.mkdir(parents=True)
    if not rehearse and not torch.cuda.is_available():
        print("No GPU here: steps that need one are reported as not run. --rehearse runs what a CPU can stand in for.")
    outcomes = run_steps(steps(out, rehearse), limit, out, rehearse=rehearse)
    print(out / "summary.json")
    return int(any(outcome.status in ("failed", "timed out") for outcome in outcomes))


def run_steps(
    planned: Sequence[Step],
    limit: float,
    out: Path,
    *,
    rehearse: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> list[Outcome]:
    """The outcome of each step, in order; the summary in `out` is written anew after each."""
    deadline = clock() + limit
    outcomes: list[Outcome] = []
    for number, step in enumerate(planned, 1):
        left = deadline - clock()
        if step.needs:
            outcome = Outcome(step.name, "not run", why=step.needs)
        elif left < LEAST:
            outcome = Outcome(step.name, "not run", why=f"the limit of {limit:g} s was used up")
        else:
            print(f"{step.name} (at most {step.share * left:.0f} s)", flush=True)
            log = out / f"{number:02d}-{step.name.replace(', ', '-').replace(' ', '-')}.log"
            outcome = _run(step, step.share * left, log)
        print(f"{outcome.name}: {outcome.status}{': ' * bool(outcome.why)}{outcome.why}", flush=True)
        outcomes.append(outcome)
        _summarize(outcomes, planned, out, limit, rehearse)
    return outcomes


def _run(step: Step, timeout: float, log: Path) -> Outcome:
    """Run a step in a process group of its own; past its time the group is interrupted, then killed."""
    started = time.monotonic()
    command = [part.replace(SECONDS, f"{MARGIN * timeout:.0f}") for part in step.command]
    outcome = Outcome(step.name, "passed", log=log.name, command=" ".join(command))
    with log.open("w") as file:
        try:
            process = subprocess.Popen(
                command,
                cwd=records.ROOT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **step.environment},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return Outcome(step.name, "failed", why=str(error), log=log.name)
        try:
            outcome.code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            outcome.status, outcome.why = "timed out", f"ended after {timeout:.0f} s"
            _end(process)
        except BaseException:
            _end(process)
            raise
    outcome.seconds = round(time.monotonic() - started, 1)
    if outcome.code is not None and outcome.code == step.finding:
        outcome.why = _last_line(log)
    elif outcome.code == 0:
        outcome.why = step.instead
    elif outcome.code:
        outcome.status, outcome.why = "failed", f"exit code {outcome.code}; {_last_line(log)}"
    return outcome


def _end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt the group, so that it can write what it has; kill what is left of it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no output"


def _summarize(outcomes: Sequence[Outcome], planned: Sequence[Step], out: Path, limit: float, rehearse: bool) -> None:
    stamp = records.stamp(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    document = {
        "rehearsal": rehearse,
        "limit_seconds": limit,
        "written": records.now(),
        "stamp": asdict(stamp),
        "steps": [asdict(outcome) for outcome in outcomes],
        "to_come": [step.name for step in planned[len(outcomes) :]],
    }
    draft = out / "summary.tmp"
    draft.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, out / "summary.json")  # whole or not at all
