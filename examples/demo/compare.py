"""Two questions, kept apart: is the pack the formula written by hand, and does the op help its task?"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from scipy.stats import t as student

from .data import FOLDS, Array
from .tasks import TASKS, Measure, Run, Task
from .train import train

# How far the pack's loss curve may lie from the formula's, as a share of the formula's highest loss. Both round in
# float32, and an element that rounding puts on the other side of its threshold changes its weight at once. Measured on
# single models: half an ulp of noise on the formula's own output and gradient moves its curve by at most 8e-4 in 60 steps
# and 5e-3 in 400 (20 seeds a task), an exceedance derivative without its factor by 3e-3 or more in 60, a JumpReLU window
# twice as wide by 4e-3.
EARLY_STEPS, EARLY_TOLERANCE, TOLERANCE = 60, 1e-3, 1e-2
VARIANTS = ("pack", "formula", "baseline")


@dataclass(frozen=True)
class Difference:
    """A measure with the op less the measure without it: the mean over the folds, and its 95 % interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def between(cls, op: Array, baseline: Array, held_out: float = 1 / (FOLDS - 1)) -> "Difference":
        """Student's interval of the paired differences, corrected after Nadeau and Bengio (2003).

        Folds share most of the rows that they learn from, so their scores are not independent. The variance of the mean is
        therefore (1/folds + held-out rows/learned rows) times that of a fold; `held_out` is the second term.
        """
        difference = op - baseline
        count, mean = len(difference), float(difference.mean())
        reach = float(student.ppf(0.975, count - 1) * difference.std(ddof=1) * (1 / count + held_out) ** 0.5)
        return cls(mean, mean - reach, mean + reach)

    def verdict(self, measure: Measure) -> str:
        if self.low <= 0 <= self.high:
            return "within noise"
        return "better" if (self.mean > 0) == (measure.better == "more") else "worse"


@dataclass(frozen=True)
class Result:
    """A task's three runs: from the same weights, on the same batches."""

    task: Task
    pack: Run
    formula: Run
    baseline: Run

    @property
    def runs(self) -> dict[str, Run]:
        return {name: getattr(self, name) for name in VARIANTS}

    @property
    def differences(self) -> Array:
        """By step, between the loss curves of pack and formula, as a share of the highest loss."""
        losses = self.formula.losses
        difference: Array = abs(self.pack.losses - losses) / losses.max()
        return difference

    @property
    def agrees(self) -> bool:
        differences = self.differences
        return bool(differences[:EARLY_STEPS].max() <= EARLY_TOLERANCE and differences.max() <= TOLERANCE)

    def difference(self, measure: Measure) -> Difference:
        return Difference.between(measure.of(self.pack), measure.of(self.baseline))


def run_tasks(*, seed: int, steps: int, device: torch.device) -> dict[str, Result]:
    columns = (TextColumn("{task.description:<48}"), BarColumn(bar_width=18), TimeElapsedColumn())
    with Progress(*columns) as progress:
        bars = {
            name: progress.add_task(task.title, total=len(VARIANTS) * steps, start=False)
            for name, task in TASKS.items()
        }
        results = {}
        for name, task in TASKS.items():
            progress.start_task(bars[name])
            results[name] = run_task(
                task, seed=seed, steps=steps, device=device, each_step=partial(progress.advance, bars[name])
            )
    return results


def run_task(task: Task, **settings: Any) -> Result:
    """`settings` are those of `train`."""
    return Result(task, *(train(task, getattr(task, variant), **settings) for variant in VARIANTS))
