"""Trains the sparse autoencoders of the front page's picture, by ``python -m docs.features``.

Digits of 64 pixels are coded in 96 features. JumpReLU with an L0 penalty and ReLU with an L1 penalty get the same data, batches,
starts and steps. Every penalty is trained on ten splits of the data, all of them side by side: tensors are [runs, rows, ...].
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import triton_thresh as tt

RESULT = Path(__file__).parents[1] / "benchmarks" / "results" / "features.json"
SPLITS, FEATURES, STEPS, BATCH, LEARNING_RATE = 10, 96, 400, 64, 6e-3
THRESHOLD, BANDWIDTH = 0.3, 0.1  # where thresholds start; the window in which they learn
L0_WEIGHTS, L1_WEIGHTS = (0.06, 0.15, 0.4, 1.0, 2.0), (0.08, 0.2, 0.5, 1.0, 1.6)

Activation = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]  # scores -> codes, features of a row, penalty of a row


def data() -> tuple[Tensor, Tensor]:
    """Rows to learn from and rows held out, [splits, rows, pixels], minus the former's mean and over their deviation."""
    pixels, digits = load_digits(return_X_y=True)
    pairs = []
    for seed in range(SPLITS):
        train, held_out = train_test_split(pixels, test_size=0.3, random_state=seed, stratify=digits)
        mean = train.mean(0)
        pairs.append([torch.tensor((part - mean) / (train - mean).std()).float() for part in (train, held_out)])
    train, held_out = zip(*pairs)
    return torch.stack(train), torch.stack(held_out)


class Autoencoders(nn.Module):
    """One a run. Features have unit length, so that no penalty can be dodged by a longer feature and a smaller code."""

    def __init__(self, runs: int, pixels: int) -> None:
        super().__init__()
        draws = [
            torch.randn(FEATURES, pixels, generator=torch.Generator().manual_seed(n % SPLITS)) for n in range(runs)
        ]
        self.features = nn.Parameter(F.normalize(torch.stack(draws), dim=-1))
        self.encoder = nn.Parameter(self.features.detach().mT.clone())
        self.bias = nn.Parameter(torch.zeros(runs, 1, FEATURES))
        self.offset = nn.Parameter(torch.zeros(runs, 1, pixels))

    def forward(self, x: Tensor, activation: Activation) -> tuple[Tensor, Tensor, Tensor]:
        code, count, penalty = activation(torch.baddbmm(self.bias, x - self.offset, self.encoder))
        return torch.baddbmm(self.offset, code, F.normalize(self.features, dim=-1)), count, penalty


def relu(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    code = scores.relu()
    return code, (code > 0).sum(-1), code.sum(-1)


def jumprelu(runs: int) -> tuple[Activation, nn.Module]:
    module = tt.nn.JumpReLU((runs, 1, FEATURES), THRESHOLD, BANDWIDTH)

    def activation(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        code, l0 = module.l0(scores)
        return code, l0, l0

    return activation, module


def trained(weights: tuple[float, ...], *, jump: bool) -> list[dict[str, Any]]:
    """For each weight of the penalty and each split: features of a held-out row, and R² of its reconstruction."""
    train, held_out = data()
    runs = len(weights) * SPLITS
    activation, thresholds = jumprelu(runs) if jump else (relu, nn.Module())
    model = Autoencoders(runs, train.shape[-1])
    optimizer = torch.optim.Adam([*model.parameters(), *thresholds.parameters()], lr=LEARNING_RATE)
    weight = torch.tensor(weights).repeat_interleave(SPLITS)
    generator, splits = torch.Generator().manual_seed(0), torch.arange(SPLITS)[:, None]
    for _ in range(STEPS):
        rows = torch.randint(train.shape[1], (SPLITS, BATCH), generator=generator)
        x = train[splits, rows].repeat(len(weights), 1, 1)
        output, _, penalty = model(x, activation)
        loss = (output - x).square().sum(-1).mean(-1) + weight * penalty.mean(-1)
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
    with torch.no_grad():
        x = held_out.repeat(len(weights), 1, 1)
        output, count, _ = model(x, activation)
        unexplained = (output - x).square().sum((1, 2)) / (x - x.mean(1, keepdim=True)).square().sum((1, 2))
    found = zip(count.float().mean(1).view(-1, SPLITS).tolist(), (1 - unexplained).view(-1, SPLITS).tolist())
    return [
        {"weight": weight, "features": [round(n, 2) for n in l0], "r2": [round(n, 4) for n in r2]}
        for weight, (l0, r2) in zip(weights, found)
    ]


def main() -> None:
    found = {
        "data": f"scikit-learn's digits, {SPLITS} splits, {FEATURES} features, {STEPS} steps",
        "torch": torch.__version__,
        "JumpReLU + L0": trained(L0_WEIGHTS, jump=True),
        "ReLU + L1": trained(L1_WEIGHTS, jump=False),
    }
    RESULT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
