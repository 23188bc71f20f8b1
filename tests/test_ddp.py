"""Two processes under DistributedDataParallel: the losses and gradients of one process on the joined batch."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn

import triton_thresh as tt
from triton_thresh import compiled, tuning

from .conftest import INTERPRETED

RANKS = 2
STEPS = 3

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="once is enough"),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo"),
]


@tt.fused_loss
def far(prediction: Tensor, target: Tensor, bound: float) -> Tensor:
    d = (prediction - target).abs()
    return torch.where(d > bound, d - bound, 0)


class Model(nn.Module):
    """A gate, a gate that learns and its count, and a gate on the gradient, which is `ranks` times that of the joined batch."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks = ranks
        self.encoder, self.decoder = nn.Linear(6, 8), nn.Linear(8, 6)
        self.activation = tt.nn.JumpReLU(8, threshold=0.125, bandwidth=0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept, count = self.activation.l0(self.encoder(tt.hardshrink(x, 0.25)))
        return tt.threshold_grad(self.decoder(kept), 1e-2 * self.ranks), count


class Record(NamedTuple):
    """What one process saw: each step's loss and gradients, and the parameters at the end."""

    losses: list[Tensor]
    gradients: list[list[Tensor]]
    parameters: list[Tensor]


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return tuple(torch.randn(2, 8, 6, dtype=torch.float64, generator=generator))  # type: ignore[return-value]


def train(model: nn.Module, rank: int, ranks: int) -> Record:
    """A few steps on this rank's share of each batch; gradients are thresholded before each, as they are when whole."""
    record = Record([], [], [])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with tt.GradientThreshold(optimizer, 1e-4):
        for step in range(STEPS):
            x, y = (part.tensor_split(ranks)[rank] for part in batch(step))
            prediction, count = model(x)
            loss = tt.threshold_mse_loss(prediction, y, 0.5) + 0.01 * count.mean() + far(prediction, y, 0.5)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            record.losses.append(loss.detach())
            record.gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    record.parameters.extend(p.detach() for p in model.parameters())
    return record


def model(ranks: int) -> Model:
    """In float64, so that rounding moves nothing across a threshold."""
    torch.manual_seed(0)
    return Model(ranks).double()


def work(rank: int, folder: str) -> None:
    """What each process runs; spawn imports this module. Programs of formulas run as they are written, because compiling takes
    longer."""
    compiled._compiled = lambda program, name: program
    torch.set_num_threads(1)
    assert tuning.may_search()
    torch.distributed.init_process_group(
        "gloo",
        init_method=Path(folder, "rendezvous").as_uri(),
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        assert not tuning.may_search(), "ranks would choose block sizes apart"
        record = train(nn.parallel.DistributedDataParallel(model(RANKS)), rank, RANKS)
        torch.save(record._asdict(), Path(folder, f"rank{rank}.pt"))
    finally:
        torch.distributed.destroy_process_group()
    assert tuning.may_search()


@pytest.mark.slow
def test_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("TRITON_THRESH_AUTOTUNE", "1")
    monkeypatch.setattr(compiled, "_compiled", lambda program, name: program)
    torch.multiprocessing.spawn(work, args=(str(tmp_path),), nprocs=RANKS)
    alone = train(model(1), 0, 1)
    ranks = [Record(**torch.load(tmp_path / f"rank{rank}.pt")) for rank in range(RANKS)]
    torch.testing.assert_close([(a + b) / 2 for a, b in zip(ranks[0].losses, ranks[1].losses)], alone.losses)
    for record in ranks:
        torch.testing.assert_close(record.gradients, alone.gradients)
        torch.testing.assert_close(record.parameters, alone.parameters)
    assert all(torch.equal(a, b) for a, b in zip(ranks[0].parameters, ranks[1].parameters)), "the ranks drifted apart"
    assert any(bool((each == 0).any()) for step in alone.gradients for each in step)
