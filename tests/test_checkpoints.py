"""Checkpoints of SAELens and dictionary_learning load, by the names and in the forms that their files have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import triton_thresh as tt

from .conftest import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="once is enough")

INPUTS, FEATURES = 6, 10
DRAW = torch.Generator().manual_seed(0)
THETA = torch.rand(FEATURES, generator=DRAW) + 0.1
W_ENC, B_ENC = torch.randn(INPUTS, FEATURES, generator=DRAW), torch.randn(FEATURES, generator=DRAW)
SHARED = {"W_enc": W_ENC, "b_enc": B_ENC, "W_dec": W_ENC.T.clone(), "b_dec": torch.zeros(INPUTS)}
LINEAR = {"encoder.weight": W_ENC.T.clone(), "encoder.bias": B_ENC, "decoder.weight": W_ENC.clone()}

# What the files hold, by package and class: sae_lens 6.54.12, its form up to 6.47.1, dictionary_learning 0.1.0.
JUMPRELU = {
    "SAELens, JumpReLUTrainingSAE": {**SHARED, "threshold": THETA},
    "SAELens, JumpReLUTrainingSAE in bfloat16": {n: t.bfloat16() for n, t in SHARED.items()} | {"threshold": THETA},
    "SAELens, JumpReLUTrainingSAE of logarithms": {**SHARED, "log_threshold": THETA.log()},
    "SAELens, BatchTopK saved for inference": {**SHARED, "threshold": torch.full((FEATURES,), 0.25)},
    "dictionary_learning, JumpReluAutoEncoder": {**SHARED, "threshold": THETA},
}
BATCH_TOPK = {
    "SAELens, BatchTopKTrainingSAE": {**SHARED, "topk_threshold": torch.tensor(0.25, dtype=torch.float64)},
    "dictionary_learning, BatchTopKSAE": {
        "k": torch.tensor(2, dtype=torch.int32),
        "threshold": torch.tensor(0.25),
        "b_dec": torch.zeros(INPUTS),
        **LINEAR,
    },
}


class Encoder(nn.Module):
    """A user's, with the names of SAELens."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.W_enc, self.b_enc = nn.Parameter(torch.zeros(INPUTS, FEATURES)), nn.Parameter(torch.zeros(FEATURES))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(torch.addmm(self.b_enc, x, self.W_enc))


def written(file: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    torch.save(file, folder / "ae.pt")
    return torch.load(folder / "ae.pt")


def scores_of(x: Tensor) -> Tensor:
    return torch.addmm(B_ENC, x, W_ENC)


@pytest.mark.parametrize("name", JUMPRELU)
@pytest.mark.parametrize("form", ["raw", "log"])
def test_jumprelu(name: str, form: str, tmp_path: Path) -> None:
    file = written(JUMPRELU[name], tmp_path)
    activation = tt.nn.JumpReLU(FEATURES, parametrization=form)  # type: ignore[arg-type]
    assert not activation.load_state_dict(file, strict=False).missing_keys
    theta = file["threshold"] if "threshold" in file else file["log_threshold"].exp()
    torch.testing.assert_close(activation.theta.detach(), theta, rtol=1e-6, atol=0)
    x = torch.randn(50, INPUTS, generator=torch.Generator().manual_seed(1))
    scores = scores_of(x)
    expected = scores.relu() * (scores > activation.theta)
    torch.testing.assert_close(activation(scores), expected)
    if form == "raw" and "threshold" in file:  # and the file can be written back
        assert torch.equal(activation.state_dict()["threshold"], file["threshold"])


@pytest.mark.parametrize("name", JUMPRELU)
def test_a_whole_encoder(name: str, tmp_path: Path) -> None:
    """The thresholds lie in a module of their own, so their names get its prefix."""
    file = written(JUMPRELU[name], tmp_path)
    model = Encoder(tt.nn.JumpReLU(FEATURES))
    own = {f"activation.{key}" if "threshold" in key else key: value for key, value in file.items() if "dec" not in key}
    model.load_state_dict(own)
    assert model.W_enc.dtype is model.b_enc.dtype is torch.float32
    x = torch.randn(50, INPUTS, generator=torch.Generator().manual_seed(1))
    scores = torch.addmm(model.b_enc, x, model.W_enc).detach()
    theta = file["threshold"] if "threshold" in file else file["log_threshold"].exp()
    torch.testing.assert_close(model(x).detach(), torch.where(scores > theta, scores, 0))


@pytest.mark.parametrize("name", BATCH_TOPK)
def test_batch_topk(name: str, tmp_path: Path) -> None:
    """dictionary_learning has another name for the threshold, and float32."""
    file = written(BATCH_TOPK[name], tmp_path)
    activation = tt.nn.BatchTopK(int(file.get("k", 2)))
    if "topk_threshold" not in file:
        file = {"topk_threshold": file["threshold"]}
    assert not activation.load_state_dict(file, strict=False).missing_keys
    assert activation.topk_threshold.dtype is torch.float64
    scores = scores_of(torch.randn(50, INPUTS, generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(activation.eval()(scores), scores.relu() * (scores.relu() > 0.25))
