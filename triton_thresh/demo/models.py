"""The models; each takes the activation that the versions of a task differ in."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


def two_layers(inputs: int, hidden: int, outputs: int, activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), activation, nn.Linear(hidden, outputs))


def three_layers(inputs: int, hidden: int, outputs: int, activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(*two_layers(inputs, hidden, hidden, activation), activation, nn.Linear(hidden, outputs))


def one_output(inputs: int, activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(*two_layers(inputs, 16, 1, activation), nn.Flatten(0))


def bottleneck(activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(*two_layers(30, 16, 4, activation), *two_layers(4, 16, 30, activation))


class Coded(NamedTuple):
    reconstruction: Tensor  # [rows, inputs]
    code: Tensor  # [rows, features]
    l0: Tensor  # [rows]: entries of the code above their thresholds


class SparseAutoencoder(nn.Module):
    """Codes a row in features of unit length; ``activation.l0`` gives the code and its counts."""

    def __init__(self, inputs: int, features: int, activation: nn.Module) -> None:
        super().__init__()
        self.features = nn.Parameter(functional.normalize(torch.randn(features, inputs)))
        self.encoder = nn.Linear(inputs, features)
        with torch.no_grad():
            self.encoder.weight.copy_(self.features * (2 * inputs / features))  # half of the features are above 0
            self.encoder.bias.zero_()
        self.offset = nn.Parameter(torch.zeros(inputs))
        self.activation = activation

    def forward(self, input: Tensor) -> Coded:
        code, l0 = self.activation.l0(self.encoder(input - self.offset))  # type: ignore[operator]
        return Coded(code @ functional.normalize(self.features) + self.offset, code, l0)


class CountedReLU(nn.ReLU):
    def l0(self, input: Tensor) -> tuple[Tensor, Tensor]:
        code = self(input)
        return code, (code > 0).sum(-1)
