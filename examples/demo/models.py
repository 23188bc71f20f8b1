"""The models, one for each fold, side by side: inputs and outputs are [folds, rows, features]."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class Perceptron(nn.Module):
    """Layers of the given sizes, with the activation between them."""

    def __init__(self, sizes: Sequence[int], folds: int, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation
        shapes = list(pairwise(sizes))
        self.weights = nn.ParameterList((2 * torch.rand(folds, a, b) - 1) / a**0.5 for a, b in shapes)
        self.biases = nn.ParameterList((2 * torch.rand(folds, 1, b) - 1) / a**0.5 for a, b in shapes)

    def forward(self, input: Tensor) -> Tensor:
        *hidden, (last_weight, last_bias) = zip(self.weights, self.biases)
        for weight, bias in hidden:
            input = self.activation(torch.baddbmm(bias, input, weight))
        return torch.baddbmm(last_bias, input, last_weight)


class OneOutput(Perceptron):
    """A perceptron that returns one number a row: [folds, rows]."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).squeeze(-1)


class Denoiser(nn.Module):
    """Takes a patch apart by a learned transform, applies the activation, and puts it together again.

    The patch's mean passes by.
    """

    def __init__(self, pixels: int, folds: int, activation: nn.Module) -> None:
        super().__init__()
        start = torch.stack([nn.init.orthogonal_(torch.empty(pixels, pixels)) for _ in range(folds)])
        self.transform = nn.Parameter(start)
        self.inverse = nn.Parameter(start.mT.clone())
        self.bias = nn.Parameter(torch.zeros(folds, 1, pixels))
        self.offset = nn.Parameter(torch.zeros(folds, 1, pixels))
        self.activation = activation

    def code(self, input: Tensor) -> Tensor:
        coefficients = torch.baddbmm(self.bias, input - input.mean(-1, keepdim=True), self.transform)
        return self.activation(coefficients)  # type: ignore[no-any-return]

    def forward(self, input: Tensor) -> Tensor:
        return input.mean(-1, keepdim=True) + torch.baddbmm(self.offset, self.code(input), self.inverse)


class LearnedShrinkage(nn.Module):
    """`shrink(x, lambd)` with a λ for each feature, learned through its logarithm, which keeps it above 0."""

    def __init__(self, shrink: Callable[[Tensor, Tensor], Tensor], features: int, lambd: float, folds: int) -> None:
        super().__init__()
        self.shrink = shrink
        self.log_lambd = nn.Parameter(torch.full((folds, 1, features), lambd).log())

    def forward(self, input: Tensor) -> Tensor:
        return self.shrink(input, self.log_lambd.exp())


class Coded(NamedTuple):
    reconstruction: Tensor  # [folds, rows, inputs]
    code: Tensor  # [folds, rows, features]
    l0: Tensor  # [folds, rows]: the entries of the code that are above their thresholds


class SparseAutoencoder(nn.Module):
    """Codes a row in features of unit length; ``activation.l0`` gives the code and its counts."""

    def __init__(self, inputs: int, features: int, folds: int, activation: nn.Module) -> None:
        super().__init__()
        start = functional.normalize(torch.randn(folds, features, inputs), dim=-1)
        self.features = nn.Parameter(start)
        self.encoder = nn.Parameter(start.mT.clone())
        self.bias = nn.Parameter(torch.zeros(folds, 1, features))
        self.offset = nn.Parameter(torch.zeros(folds, 1, inputs))
        self.activation = activation

    @property
    def directions(self) -> Tensor:
        return functional.normalize(self.features, dim=-1)

    def scores(self, input: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, input - self.offset, self.encoder)

    def forward(self, input: Tensor) -> Coded:
        code, l0 = self.activation.l0(self.scores(input))  # type: ignore[operator]
        return Coded(torch.baddbmm(self.offset, code, self.directions), code, l0)


class CountedReLU(nn.ReLU):
    def l0(self, input: Tensor) -> tuple[Tensor, Tensor]:
        code = self(input)
        return code, (code > 0).sum(-1)
