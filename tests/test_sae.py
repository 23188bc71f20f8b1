"""examples/jumprelu_sae.py: what it writes, what it counts as recovered, and that it learns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from examples import jumprelu_sae as example

from .conftest import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="once is enough")


def test_what_it_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example.main(["--features", "64", "--steps", "60", "--out", str(tmp_path / "made")])
    found = json.loads((tmp_path / "made" / "jumprelu_sae.json").read_text())
    assert [line["method"] for line in found["table"]] == list(example.METHODS)
    assert found["recovered"] == found["table"][0]["recovered"]
    assert all(0 < line["l0"] < 32 and line["r2"] < 1 for line in found["table"])
    assert found["table"][1]["r2"] > 0.2
    with Image.open(tmp_path / "made" / "jumprelu_sae.png") as picture:
        assert picture.width > 1000
    said = capsys.readouterr().out
    assert f"JumpReLU found {found['recovered']:.1%}" in said
    assert all(method in said for method in example.METHODS)


def test_recovered_counts_a_direction_once() -> None:
    dictionary = torch.eye(4)
    near = F.normalize(torch.tensor([[1.0, 0.3, 0, 0], [1.0, 0.6, 0, 0], [0, 0, 1, 0], [0, 0, 0, -1]]), dim=-1)
    assert example.recovered(dictionary, near) == 0.5
    both = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1]]), dim=-1)
    assert example.recovered(both, both[:1]) == 0.5


def test_rows_are_sums_of_the_dictionary() -> None:
    data = example.Data(32, 48, 0, torch.device("cpu"))
    x = data.batch(10)
    torch.testing.assert_close(data.dictionary.norm(dim=-1), torch.ones(32))
    sizes = torch.linalg.lstsq(data.dictionary.T, x.T).solution.T
    assert (sizes.abs() > 0.1).sum(-1).le(example.ACTIVE).all()
    torch.testing.assert_close(sizes @ data.dictionary, x, rtol=1e-4, atol=1e-4)


def test_a_revived_feature_forgets() -> None:
    model = example.SparseAutoencoder("JumpReLU + L0", F.normalize(torch.randn(6, 4), dim=-1))
    optimizer = torch.optim.Adam(model.parameters())
    coded = model.encode(torch.randn(8, 4))
    (model.decode(coded.code).sum() + coded.l0.sum() + sum(p.sum() for p in model.parameters())).backward()
    optimizer.step()
    dead, directions = torch.tensor([1, 4]), F.normalize(torch.randn(2, 4), dim=-1)
    model.revive(dead, directions, optimizer)
    assert torch.equal(model.decoder[dead], directions)
    assert torch.equal(model.encoder[dead], directions)
    for parameter in (model.decoder, model.encoder, model.bias):
        moments = optimizer.state[parameter]["exp_avg"]
        assert moments[dead].count_nonzero() == 0
        assert moments[0].count_nonzero() > 0
