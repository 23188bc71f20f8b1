"""Two processes under DistributedDataParallel: the losses and gradients of one process on the joined batch."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed.nn
import torch.multiprocessing
import torch.nn.functional as F
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


class SigLIP(nn.Module):
    """Two towers, and the loss of their features. The texts of all ranks are gathered, with their gradients."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks = ranks
        self.image, self.text = nn.Linear(6, 4), nn.Linear(6, 4)
        self.logit_scale, self.logit_bias = nn.Parameter(torch.tensor(10.0).log()), nn.Parameter(torch.tensor(-10.0))

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        image, text = (F.normalize(tower(x), dim=-1) for tower, x in ((self.image, images), (self.text, texts)))
        rows, scale = len(image), self.logit_scale.exp()
        if self.ranks == 1:  # open_clip's formula
            logits = scale * image @ text.T + self.logit_bias
            return -F.logsigmoid((2 * torch.eye(rows) - 1) * logits).sum() / rows
        every = torch.cat(torch.distributed.nn.all_gather(text))  # type: ignore[no-untyped-call]
        labels = torch.distributed.get_rank() * rows + torch.arange(rows)[:, None]
        return tt.linear_threshold_loss(
            image, every, labels=labels, scale=scale, bias=self.logit_bias, divisor=rows, chunk_size=5
        )


def siglip(ranks: int) -> SigLIP:
    torch.manual_seed(1)
    return SigLIP(ranks).double()


def contrasted(model: nn.Module, rank: int, ranks: int) -> Record:
    """The loss of this rank's images, and the gradients of all parameters."""
    loss = model(*[part.tensor_split(ranks)[rank] for part in batch(0)])
    loss.backward()
    return Record([loss.detach()], [[p.grad for p in model.parameters() if p.grad is not None]], [])


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
        torch.save(record._asdict(), Path(folder, f"train{rank}.pt"))
        record = contrasted(nn.parallel.DistributedDataParallel(siglip(RANKS)), rank, RANKS)
        torch.save(record._asdict(), Path(folder, f"siglip{rank}.pt"))
    finally:
        torch.distributed.destroy_process_group()
    assert tuning.may_search()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the processes wrote what they saw."""
    made = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        patch.setenv("TRITON_THRESH_AUTOTUNE", "1")
        torch.multiprocessing.spawn(work, args=(str(made),), nprocs=RANKS)
        yield made


def seen(folder: Path, name: str) -> list[Record]:
    return [Record(**torch.load(folder / f"{name}{rank}.pt")) for rank in range(RANKS)]


@pytest.mark.slow
def test_two_processes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_compiled", lambda program, name: program)
    alone, ranks = train(model(1), 0, 1), seen(folder, "train")
    torch.testing.assert_close([(a + b) / 2 for a, b in zip(ranks[0].losses, ranks[1].losses)], alone.losses)
    for record in ranks:
        torch.testing.assert_close(record.gradients, alone.gradients)
        torch.testing.assert_close(record.parameters, alone.parameters)
    assert all(torch.equal(a, b) for a, b in zip(ranks[0].parameters, ranks[1].parameters)), "the ranks drifted apart"
    assert any(bool((each == 0).any()) for step in alone.gradients for each in step)


@pytest.mark.slow
def test_siglip_on_two_processes_is_open_clips_on_the_joined_batch(folder: Path) -> None:
    """The mean of the ranks' losses, and the gradients of both towers, of the scale and of the bias."""
    alone, ranks = contrasted(siglip(1), 0, 1), seen(folder, "siglip")
    torch.testing.assert_close((ranks[0].losses[0] + ranks[1].losses[0]) / 2, alone.losses[0], rtol=1e-12, atol=0)
    assert len(alone.gradients[0]) == 6
    for record in ranks:
        torch.testing.assert_close(record.gradients, alone.gradients, rtol=1e-10, atol=1e-14)
