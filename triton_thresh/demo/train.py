"""Trains the three versions of each task side by side, times every step, and scores them on the rows held out."""

import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

import triton_thresh as tt

from ..backend import Backend
from .data import Array, Data
from .memory import peak_bytes
from .tasks import TASKS, Task, Version

# In this order on even steps and backwards on odd ones: pack and formula then follow the same neighbours equally often.
VERSIONS: tuple[Version, ...] = ("pack", "plain", "formula")
WARM_UP = 10  # steps left out of the medians: optimizer state, first allocations, autotune
WATCH_EVERY = 10  # steps
RESAMPLES = 200

# How far the pack's loss curve may lie from the formula's, as a share of the formula's highest loss. Both round in
# float32, and an element that rounding puts on the other side of its threshold changes its weight at once. Measured:
# half an ulp of noise on the formula's own output and gradient moves its curve by at most 8e-4 in 60 steps and 5e-3 in
# 400 (20 seeds a task), an exceedance derivative without its factor by 3e-3 or more in 60, a JumpReLU window twice as wide
# by 4e-3.
EARLY_STEPS, EARLY_TOLERANCE, TOLERANCE = 60, 1e-3, 1e-2


@dataclass(frozen=True)
class Trained:
    curve: Array
    milliseconds: float
    peak_bytes: int
    prediction: Array
    metric: float
    secondary: float
    watched: dict[str, list[float]]  # every WATCH_EVERY steps from the first


@dataclass(frozen=True)
class Result:
    task: Task
    data: Data
    trained: dict[Version, Trained]
    gain_interval: tuple[float, float]

    @property
    def differences(self) -> Array:
        """By step, between the loss curves of pack and formula."""
        difference: Array = np.abs(self.trained["pack"].curve - self.trained["formula"].curve)
        return difference

    @property
    def agrees(self) -> bool:
        highest = self.trained["formula"].curve.max()
        early = self.differences[:EARLY_STEPS].max() <= EARLY_TOLERANCE * highest
        return bool(early and self.differences.max() <= TOLERANCE * highest)

    @property
    def gain(self) -> float:
        return self.trained["pack"].metric - self.trained["plain"].metric

    @property
    def verdict(self) -> str:
        low, high = self.gain_interval
        return "better" if low > 0 else "worse" if high < 0 else "within noise"


class Trainee:
    """One version of a task: its model, the loss after every step, and what the steps took."""

    def __init__(self, task: Task, version: Version, device: torch.device, seed: int) -> None:
        torch.manual_seed(seed)
        self.task, self.device = task, device
        self.loss = task.loss[version]
        self.model = task.model(task.activation[version]()).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=task.learning_rate)
        task.hook[version](self.optimizer)
        self.losses: list[Tensor] = []
        self.seconds: list[float] = []
        self.watched: dict[str, list[float]] = {}

    def update(self, input: Tensor, target: Tensor) -> Tensor:
        loss = self.loss(self.model(input), target)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def step(self, input: Tensor, target: Tensor) -> None:
        self.optimizer.zero_grad()
        self.synchronize()
        start = time.perf_counter()
        loss = self.update(input, target)
        self.synchronize()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @torch.no_grad()
    def watch(self, held_out: Tensor) -> None:
        if self.task.watch is not None:
            for name, value in self.task.watch(self.model, held_out).items():
                self.watched.setdefault(name, []).append(value)

    def finish(self, data: Data, input: Tensor, target: Tensor) -> Trained:
        """Score the model; then train on by a step, for its peak of memory."""
        held_out = data.test_input.to(self.device)
        with torch.no_grad():
            prediction = self.task.predict(self.model, held_out).cpu().numpy()
            secondary = float(self.task.secondary(self.model, held_out).float().mean())
        warm = min(WARM_UP, len(self.seconds) // 2)
        self.optimizer.zero_grad()
        return Trained(
            curve=torch.stack(self.losses).cpu().numpy(),
            milliseconds=1e3 * statistics.median(self.seconds[warm:]),
            peak_bytes=peak_bytes(lambda: self.update(input, target), self.device),
            prediction=prediction,
            metric=self.task.score(prediction, data.test_truth),
            secondary=secondary,
            watched=self.watched,
        )


@contextmanager
def one_thread() -> Iterator[None]:
    """Steps this small gain nothing from a second thread, and take 25 times as long where its core is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def train_all(device: torch.device, backend: Backend, seed: int, steps: int) -> dict[str, Result]:
    columns = (TextColumn("{task.description:<36}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress, tt.use_backend(backend):
        bars = {name: progress.add_task(task.title, total=steps, start=False) for name, task in TASKS.items()}
        results = {}
        for name, task in TASKS.items():
            progress.start_task(bars[name])
            results[name] = train(task, device, seed, progress.track(range(steps), task_id=bars[name]))
    return results


def train(task: Task, device: torch.device, seed: int, steps: Iterable[int]) -> Result:
    data = task.load(seed)
    train_input, train_target, held_out = (
        tensor.to(device) for tensor in (data.train_input, data.train_target, data.test_input)
    )
    trainees = {version: Trainee(task, version, device, seed) for version in VERSIONS}
    generator = torch.Generator().manual_seed(seed)
    for step in steps:
        rows = torch.randperm(len(train_input), generator=generator)[: task.batch]
        input, target = train_input[rows], train_target[rows]
        if task.noise:
            input = input + task.noise * torch.randn(input.shape, generator=generator).to(device)
        for version in VERSIONS[:: 1 if step % 2 == 0 else -1]:
            trainees[version].step(input, target)
            if step % WATCH_EVERY == 0:
                trainees[version].watch(held_out)
    trained = {version: trainee.finish(data, input, target) for version, trainee in trainees.items()}
    return Result(task, data, trained, gain_interval(task, data, trained, seed))


def gain_interval(task: Task, data: Data, trained: dict[Version, Trained], seed: int) -> tuple[float, float]:
    """95 % of the gains over the plain run on held-out rows drawn again with replacement."""
    count = len(data.test_truth)

    def gain(rows: Array) -> float:
        pack, plain = (task.score(trained[v].prediction[rows], data.test_truth[rows]) for v in ("pack", "plain"))
        return pack - plain

    gains = [gain(rows) for rows in np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))]
    low, high = np.percentile(gains, (2.5, 97.5))
    return float(low), float(high)
