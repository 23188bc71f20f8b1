"""The results as tables on the terminal, a JSON and a picture."""

import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import triton_thresh as tt

from .compare import EARLY_STEPS, EARLY_TOLERANCE, TOLERANCE, VARIANTS, Result
from .data import FOLDS
from .picture import draw
from .tasks import Measure
from .train import WATCH_EVERY

PACKAGES = ("torch", "triton", "numpy", "scikit-learn", "matplotlib")


def publish(results: Mapping[str, Result], folder: Path, setting: Mapping[str, Any]) -> bool:
    """Print the tables, write the JSON and the picture; true if pack and formula agree on every task."""
    on_gpu = setting["device"] != "cpu"
    text = json.dumps(document(results, setting, on_gpu), indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")
    draw(results, folder / "results.png")
    same = sum(result.agrees for result in results.values())
    console = Console(highlight=False)
    console.print(
        f"\n{setting['device']}, backend {setting['backend']}; {setting['steps']} steps, seed {setting['seed']}\n\n"
        f"[bold]1. Each op is the formula written by hand: {same} of {len(results)}[/bold]\n"
        "How far their loss curves part, from the same weights and on the same batches, as a share of the highest loss. "
        "Rounding may put an element on the other side of its threshold; from there on the curves part a little.\n",
        same_table(results),
    )
    if same < len(results):
        console.print(
            f"[bold red]A curve leaves the formula's by more than {EARLY_TOLERANCE:g} in the first {EARLY_STEPS} steps, or by "
            f"more than {TOLERANCE:g} later.[/bold red]"
        )
    console.print(
        f"\n[bold]2. What each op does for its task, beside a baseline[/bold]\nMeans of {FOLDS} folds on the rows that they "
        "hold out, and the paired difference with its 95 % interval: within noise if that contains 0.\n"
    )
    for result in results.values():
        task = result.task
        console.print(f"[bold]{task.title}[/bold]\n[bold]{task.op}[/bold] against {task.baseline_name}. {task.purpose}")
        console.print(effect_table(result), "")
    if on_gpu:
        console.print(
            "[bold]3. A step on this GPU, ms[/bold]\nModels this small measure how fast the host launches kernels.\n",
            time_table(results),
        )
    console.print(f"{folder.resolve()}: results.png, results.json", soft_wrap=True)
    return same == len(results)


def same_table(results: Mapping[str, Result]) -> Table:
    table = Table("op", f"first {EARLY_STEPS} steps", "all steps", "same", box=None, padding=(0, 2, 0, 0))
    for result in results.values():
        differences = result.differences
        highest = (f"{part.max():.0e}" if part.max() else "0" for part in (differences[:EARLY_STEPS], differences))
        table.add_row(result.task.op, *highest, "yes" if result.agrees else "[bold red]no")
    return table


def effect_table(result: Result) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for header in ("", "without", "with", "difference [95 %]", "with it is"):
        table.add_column(header, no_wrap=True, min_width=20 if not header else None)
    for measure in result.task.measures:
        difference, form = result.difference(measure), measure.format.format
        signed = measure.format.replace(":", ":+").format
        table.add_row(
            measure.name,
            form(measure.of(result.baseline).mean()),
            form(measure.of(result.pack).mean()),
            f"{signed(difference.mean)} \\[{signed(difference.low)}, {signed(difference.high)}]",
            difference.verdict(measure),
        )
    return table


def time_table(results: Mapping[str, Result]) -> Table:
    table = Table("op", *VARIANTS, box=None, padding=(0, 2, 0, 0))
    for result in results.values():
        table.add_row(result.task.op, *(f"{run.milliseconds:.3f}" for run in result.runs.values()))
    return table


def document(results: Mapping[str, Result], setting: Mapping[str, Any], on_gpu: bool) -> dict[str, Any]:
    return {
        **setting,
        "versions": {"triton_thresh": tt.__version__, "python": platform.python_version()}
        | {package: installed(package) for package in PACKAGES},
        "tolerance": {f"first {EARLY_STEPS} steps": EARLY_TOLERANCE, "all steps": TOLERANCE},
        "agrees": all(result.agrees for result in results.values()),
        "folds": FOLDS,
        "tasks": {name: described(result, on_gpu) for name, result in results.items()},
        "losses": {
            name: {variant: run.losses.tolist() for variant, run in result.runs.items()}
            for name, result in results.items()
        },
        f"every {WATCH_EVERY} steps": {
            name: {
                variant: {label: values.mean(1).tolist() for label, values in run.watched.items()}
                for variant, run in result.runs.items()
            }
            for name, result in results.items()
            if result.pack.watched
        },
    }


def described(result: Result, on_gpu: bool) -> dict[str, Any]:
    task, differences = result.task, result.differences
    times = {name: run.milliseconds for name, run in result.runs.items()}
    return {
        "title": task.title,
        "op": task.op,
        "settings": dict(task.settings),
        "purpose": task.purpose,
        "baseline": task.baseline_name,
        "agrees": result.agrees,
        "loss_difference": float(differences.max()),
        f"loss_difference_first_{EARLY_STEPS}_steps": float(differences[:EARLY_STEPS].max()),
        "measures": {measure.name: measured(result, measure) for measure in task.measures},
    } | ({"ms_per_step": times} if on_gpu else {})


def measured(result: Result, measure: Measure) -> dict[str, Any]:
    difference = result.difference(measure)
    return {
        "better": measure.better,
        "by_fold": {name: measure.of(run).tolist() for name, run in result.runs.items()},
        "pack_minus_baseline": {
            "mean": difference.mean,
            "low": difference.low,
            "high": difference.high,
            "verdict": difference.verdict(measure),
        },
    }


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
