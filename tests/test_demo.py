"""The demo end to end: what it writes, that the pack follows the formula written by hand, and how it refuses to run."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from triton_thresh import demo

pytestmark = pytest.mark.slow

STEPS = 12
NAMES = ("classifier", "regressor", "detector", "denoiser", "autoencoder", "gradients")
VERSIONS = {"pack", "plain", "formula"}


def numbers_in(value: object) -> list[float]:
    if isinstance(value, dict):
        return [n for item in value.values() for n in numbers_in(item)]
    if isinstance(value, list):
        return [n for item in value for n in numbers_in(item)]
    return [float(value)] if isinstance(value, (int, float)) else []


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_results(device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    assert demo.main(["--device", device, "--steps", str(STEPS), "--seed", "3", "--out", str(tmp_path)]) == 0
    assert torch.get_num_threads() == threads
    printed = capsys.readouterr().out
    assert str(tmp_path) in printed
    assert "results.json" in printed
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")

    document = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert (document["seed"], document["steps"], document["agrees"]) == (3, STEPS, True)
    assert document["backend"] == ("triton" if device == "cuda" else "eager")
    assert document["versions"]["torch"] == torch.__version__
    assert all(map(math.isfinite, numbers_in(document)))
    assert tuple(document["tasks"]) == tuple(document["losses"]) == NAMES
    for name, task in document["tasks"].items():
        losses = document["losses"][name]
        assert set(task["runs"]) == set(losses) == VERSIONS
        assert all(len(curve) == STEPS for curve in losses.values())
        np.testing.assert_allclose(losses["pack"], losses["formula"], rtol=1e-5)
        assert losses["pack"][-1] < losses["pack"][0]
        pack, formula = task["runs"]["pack"], task["runs"]["formula"]
        for measure in ("metric", "secondary"):
            assert pack[measure] == pytest.approx(formula[measure], rel=1e-3)
        assert all(run["ms_per_step"] > 0 and run["peak_bytes"] > 0 for run in task["runs"].values())

    watched = document["every 10 steps"]
    assert set(watched) == {"autoencoder", "gradients"}
    for of_task in watched.values():
        assert set(of_task) == VERSIONS
        for label, values in of_task["pack"].items():
            assert len(values) == 2  # after the first step and the eleventh
            assert values == pytest.approx(of_task["formula"][label], rel=1e-3)
    pack, plain = watched["gradients"]["pack"], watched["gradients"]["plain"]
    assert list(pack) == list(plain) == ["64 → 128", "128 → 128", "128 → 10"]
    assert all(0 < kept < without for layer in pack for kept, without in zip(pack[layer], plain[layer]))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_peak_of_memory(device: str) -> None:
    from triton_thresh.demo.memory import peak_bytes

    where, mebibyte = torch.device(device), 2**20
    held = torch.empty(mebibyte, dtype=torch.uint8, device=where)

    def one_then_two() -> torch.Tensor:
        held.clone()
        first = held.clone()
        second = held.clone()
        del first
        return second

    assert peak_bytes(one_then_two, where) == 2 * mebibyte
    assert peak_bytes(lambda: None, where) == 0


def test_jumprelu_by_hand_has_the_gradients_of_its_source() -> None:
    from triton_thresh.demo import formulas

    activation = formulas.JumpReLU(2, threshold=0.5, bandwidth=0.5)
    x = torch.tensor([[0.6, 0.9], [0.4, 3.0], [0.7, 0.25]], requires_grad=True)
    code, l0 = activation.l0(x)
    torch.testing.assert_close(code, torch.tensor([[0.6, 0.9], [0.0, 3.0], [0.7, 0.0]]))
    assert l0.tolist() == [2, 1, 1]
    (code.sum() + 10 * l0.sum()).backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[1, 1], [0, 1], [1, 0]]
    # The window is 0.25 < x < 0.75: all of the first feature, none of the second.
    assert activation.threshold.grad.tolist() == [3 * (-0.5 / 0.5) + 3 * 10 * (-1 / 0.5), 0]


@pytest.mark.parametrize("name", ["regressor", "denoiser", "autoencoder"])
def test_a_seed_decides_everything(name: str) -> None:
    from triton_thresh.demo.tasks import TASKS
    from triton_thresh.demo.train import train

    first, again, other = (train(TASKS[name], torch.device("cpu"), seed, range(3)) for seed in (5, 5, 6))
    for version, run in first.trained.items():
        np.testing.assert_array_equal(run.curve, again.trained[version].curve)
        np.testing.assert_array_equal(run.prediction, again.trained[version].prediction)
        assert not np.array_equal(run.curve, other.trained[version].curve)
    assert first.gain_interval == again.gain_interval


def test_wrong_versions_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton_thresh.demo import report, tasks

    detector, autoencoder, gradients = (tasks.TASKS[name] for name in ("detector", "autoencoder", "gradients"))
    monkeypatch.setitem(detector.loss, "pack", detector.loss["plain"])
    monkeypatch.setitem(autoencoder.activation, "pack", partial(autoencoder.activation["pack"], input_gradient=True))
    monkeypatch.setitem(gradients.hook, "pack", gradients.hook["plain"])
    monkeypatch.setattr(report, "draw", lambda results, path: None)
    assert demo.main(["--device", "cpu", "--steps", "3", "--out", str(tmp_path)]) == demo.DISAGREE
    document = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [name for name, task in document["tasks"].items() if not task["agrees"]] == [
        "detector",
        "autoencoder",
        "gradients",
    ]


def run_demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "triton_thresh", "demo", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_triton_on_a_cpu_is_refused(tmp_path: Path) -> None:
    done = run_demo("--device", "cpu", "--backend", "triton", "--out", str(tmp_path / "out"))
    assert done.returncode == demo.CANNOT_RUN
    assert "TRITON_INTERPRET=1" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda module: None if module == "sklearn" else object())
    assert demo.main([]) == demo.CANNOT_RUN
    assert "scikit-learn missing: pip install scikit-learn" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch finds a GPU")
def test_a_missing_gpu_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--device", "cuda"]) == demo.CANNOT_RUN
    assert "torch finds no GPU" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--seed", "-1"], ["--steps", "many"]])
def test_bad_arguments(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        demo.main(arguments)
    assert refused.value.code == 2


def test_a_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert demo.main(["--device", "cpu", "--out", str(tmp_path / "file")]) == demo.CANNOT_RUN
    assert "file" in capsys.readouterr().err
