"""The results as a table on the terminal, a JSON and a picture."""

import json
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import triton_thresh as tt

from .picture import draw
from .tasks import Task
from .train import EARLY_STEPS, EARLY_TOLERANCE, TOLERANCE, WATCH_EVERY, Result, Trained

PACKAGES = ("torch", "triton", "numpy", "scikit-learn", "matplotlib")
ACROSS = 3  # tasks in a table
Row = tuple[str, Callable[[Result], str]]


def publish(results: dict[str, Result], folder: Path, setting: dict[str, Any]) -> bool:
    """Print the table, write the JSON and the picture; whether pack and formula agree on every task."""
    agrees = all(result.agrees for result in results.values())
    document = setting | {
        "versions": {"triton_thresh": tt.__version__, "python": platform.python_version()}
        | {package: installed(package) for package in PACKAGES},
        "tolerance": {f"first {EARLY_STEPS} steps": EARLY_TOLERANCE, "all steps": TOLERANCE},
        "agrees": agrees,
        "tasks": {name: described(result) for name, result in results.items()},
        "losses": {
            name: {version: run.curve.tolist() for version, run in result.trained.items()}
            for name, result in results.items()
        },
        f"every {WATCH_EVERY} steps": {
            name: {version: run.watched for version, run in result.trained.items()}
            for name, result in results.items()
            if result.task.watch
        },
    }
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")
    draw(results, folder / "results.png")
    console = Console(highlight=False)
    console.print(
        f"[italic]{setting['device']}, {setting['backend']}; {setting['steps']} steps, seed {setting['seed']}"
    )
    names = list(results)
    for first in range(0, len(names), ACROSS):
        console.print(table({name: results[name] for name in names[first : first + ACROSS]}))
    console.print("[italic]intervals resample the held-out rows; peak: the most a step holds at a time")
    for name, result in results.items():
        console.print(f"[bold]{name}[/bold]: {summary(result)}")
    if not agrees:
        console.print("[bold red]The pack's loss curves leave the formula's by more than the tolerance.[/bold red]")
    console.print(f"{folder.resolve()}: results.json, results.png", soft_wrap=True)
    return agrees


def table(results: dict[str, Result]) -> Table:
    rows: list[Row] = [
        ("metric", lambda r: r.task.metric),
        ("  pack", lambda r: f"{r.trained['pack'].metric:.4g}"),
        ("  formula", lambda r: f"{r.trained['formula'].metric:.4g}"),
        ("  plain", lambda r: f"{r.trained['plain'].metric:.4g}"),
        ("beside it", lambda r: r.task.secondary_label),
        ("  pack", lambda r: secondary(r.task, r.trained["pack"])),
        ("  formula", lambda r: secondary(r.task, r.trained["formula"])),
        ("  plain", lambda r: secondary(r.task, r.trained["plain"])),
        ("pack - plain", lambda r: f"{r.gain:+.3f}"),
        ("  95 % interval", lambda r: "{:+.3f}, {:+.3f}".format(*r.gain_interval)),
        ("  pack is", lambda r: r.verdict),
        ("losses differ by", lambda r: f"{r.differences.max():.1e}"),
        (f"  first {EARLY_STEPS} steps", lambda r: f"{r.differences[:EARLY_STEPS].max():.1e}"),
        ("ms/step: pack", lambda r: f"{r.trained['pack'].milliseconds:.3f}"),
        ("  formula", lambda r: f"{r.trained['formula'].milliseconds:.3f}"),
        ("peak KiB: pack", lambda r: f"{r.trained['pack'].peak_bytes / 1024:.0f}"),
        ("  formula", lambda r: f"{r.trained['formula'].peak_bytes / 1024:.0f}"),
    ]
    made = Table(box=SIMPLE_HEAD, padding=0)
    made.add_column("", no_wrap=True)
    for name in results:
        made.add_column(name, width=18)
    for label, cell in rows:
        made.add_row(label, *map(cell, results.values()))
    return made


def summary(result: Result) -> str:
    task = result.task
    settings = ", ".join(f"{name}={value:g}" for name, value in numbers(task).items())
    return f"{task.title}; {task.op}({settings}) against {task.plain}"


def secondary(task: Task, run: Trained) -> str:
    return task.secondary_format.format(run.secondary)


def described(result: Result) -> dict[str, Any]:
    task = result.task
    low, high = result.gain_interval
    return {
        "title": task.title,
        "op": task.op,
        "settings": numbers(task),
        "why": task.why,
        "plain": task.plain,
        "metric": task.metric,
        "loss_difference": float(result.differences.max()),
        f"loss_difference_first_{EARLY_STEPS}_steps": float(result.differences[:EARLY_STEPS].max()),
        "agrees": result.agrees,
        "pack_minus_plain": {"metric": result.gain, "low": low, "high": high, "verdict": result.verdict},
        "secondary": task.secondary_label,
        "runs": {
            name: {
                "metric": run.metric,
                "secondary": run.secondary,
                "ms_per_step": run.milliseconds,
                "peak_bytes": run.peak_bytes,
            }
            for name, run in result.trained.items()
        },
    }


def numbers(task: Task) -> dict[str, float]:
    return {name: float(value) for name, value in task.settings.items()}


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
