"""Trains a variant of a task on every fold at once, and compares variants on the rows held out."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from .data import FOLDS, Array
from .tasks import Run, Task, Variant

STEPS = 400
WATCH_EVERY = 10  # steps
WARM_UP = 10  # steps left out of the median time: optimizer state, first allocations, autotune


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
def train(
    task: Task,
    variant: Variant,
    *,
    seed: int = 0,
    steps: int = STEPS,
    folds: int = FOLDS,
    device: torch.device | str = "cpu",
    each_step: Callable[[], object] = lambda: None,
) -> Run:
    """One model for each fold, all in one optimizer: Adam works element by element, so they do not touch.

    The seed decides folds, weights, batches and noise, so that the variants of a task are given the same ones.
    """
    data, device = task.load(seed).first(folds), torch.device(device)
    train_input, train_target, held_out = (
        part.to(device) for part in (data.train_input, data.train_target, data.test_input)
    )
    torch.manual_seed(seed)
    model = task.network(folds, variant.activation(folds)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), task.learning_rate, fused=True)
    variant.hook(optimizer)
    generator = torch.Generator().manual_seed(seed)
    losses: list[Tensor] = []
    seconds: list[float] = []
    watched: dict[str, list[Array]] = {}
    for step in range(steps):
        rows = torch.randperm(train_input.shape[1], generator=generator)[: task.batch].to(device)
        input, target = train_input[:, rows], train_target[:, rows]
        if task.noise:
            input = input + task.noise * torch.randn(input.shape, generator=generator).to(device)
        start = clock(device)
        optimizer.zero_grad()
        loss = variant.loss(model(input), target)
        (folds * loss).backward()  # loss is the mean over the folds; each gets the gradient that it would get alone
        optimizer.step()
        seconds.append(clock(device) - start)
        losses.append(loss.detach())
        if step % WATCH_EVERY == 0 or step == steps - 1:
            with torch.no_grad():
                for name, values in task.watch(model, held_out).items():
                    watched.setdefault(name, []).append(values.cpu().numpy().copy())
        each_step()
    with torch.no_grad():
        prediction = task.predict(model, held_out).cpu().numpy()
    return Run(
        data,
        model,
        losses=torch.stack(losses).cpu().numpy(),
        prediction=prediction,
        watched={name: np.stack(values) for name, values in watched.items()},
        milliseconds=1e3 * statistics.median(seconds[min(WARM_UP, steps // 2) :]),
    )


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
