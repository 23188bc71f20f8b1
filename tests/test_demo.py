"""The demo: the pack follows the formula written by hand, what it writes, and how it refuses to run."""

from __future__ import annotations

import ast
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import triton_thresh as tt
from examples.demo import __main__ as demo

for module in demo.DISTRIBUTIONS:
    pytest.importorskip(module, reason=f"the demo needs {module}")

from examples.demo import compare, data, formulas, report, tasks  # noqa: E402
from examples.demo.train import train  # noqa: E402

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
STEPS = 12
VARIANTS = {"pack", "formula", "baseline"}


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
    assert "6 of 6" in printed
    assert "results.json" in printed
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")

    document = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert (document["seed"], document["steps"], document["agrees"]) == (3, STEPS, True)
    assert document["backend"] == ("triton" if device == "cuda" else "eager")
    assert document["versions"]["torch"] == torch.__version__
    assert all(map(math.isfinite, numbers_in(document)))
    assert tuple(document["tasks"]) == tuple(document["losses"]) == tuple(tasks.TASKS)
    for name, task in document["tasks"].items():
        losses = document["losses"][name]
        assert set(losses) == VARIANTS
        assert all(len(curve) == STEPS for curve in losses.values())
        np.testing.assert_allclose(losses["pack"], losses["formula"], rtol=1e-5)
        assert losses["pack"][-1] < losses["pack"][0]
        for measure in task["measures"].values():
            assert measure["by_fold"]["pack"] == pytest.approx(measure["by_fold"]["formula"], rel=1e-3)
            assert all(len(values) == data.FOLDS for values in measure["by_fold"].values())
            difference = measure["pack_minus_baseline"]
            assert difference["low"] <= difference["mean"] <= difference["high"]

    # On a CPU nobody is told a time: the Triton kernels take no part.
    assert (device == "cuda") == ("ms" in printed.split()) == ("ms_per_step" in json.dumps(document))
    watched = document["every 10 steps"]
    assert set(watched) == {"autoencoder", "gradients"}
    pack, baseline = watched["gradients"]["pack"], watched["gradients"]["baseline"]
    assert list(pack) == list(baseline) == ["layer 1", "layer 2", "layer 3", tasks.ALL_LAYERS]
    for layer in pack:
        assert len(pack[layer]) == 3  # after the first step, the eleventh and the last
        assert all(0 < kept < without for kept, without in zip(pack[layer], baseline[layer]))


def test_jumprelu_by_hand_has_the_gradients_of_its_source() -> None:
    activation = formulas.JumpReLU((2,), threshold=0.5, bandwidth=0.5)
    x = torch.tensor([[0.6, 0.9], [0.4, 3.0], [0.7, 0.25]], requires_grad=True)
    code, l0 = activation.l0(x)
    torch.testing.assert_close(code, torch.tensor([[0.6, 0.9], [0.0, 3.0], [0.7, 0.0]]))
    assert l0.tolist() == [2, 1, 1]
    (code.sum() + 10 * l0.sum()).backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[1, 1], [0, 1], [1, 0]]
    # The window is 0.25 < x < 0.75: all of the first feature, none of the second.
    assert activation.threshold.grad.tolist() == [3 * (-0.5 / 0.5) + 3 * 10 * (-1 / 0.5), 0]


@pytest.mark.parametrize("name", tasks.TASKS)
def test_a_seed_decides_everything(name: str) -> None:
    task = tasks.TASKS[name]
    first, again, other = (train(task, task.baseline, seed=seed, steps=2, folds=2) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first.losses, again.losses)
    np.testing.assert_array_equal(first.prediction, again.prediction)
    assert not np.array_equal(first.losses, other.losses)


def test_every_row_is_held_out_once_and_never_learned_from() -> None:
    for task in tasks.TASKS.values():
        loaded = task.load(0)
        rows = np.sort(loaded.test_rows.ravel())
        np.testing.assert_array_equal(rows, np.arange(len(rows)))
        assert loaded.train_input.shape[1] == len(rows) * (data.FOLDS - 1) // data.FOLDS
    loaded = data.noisy_patches(0)
    whole = np.empty((loaded.test_rows.size, data.PATCH**2))
    whole[loaded.test_rows.ravel()] = loaded.test_truth.reshape(whole.shape)
    np.testing.assert_array_equal(whole, data.patches())
    assert data.photographs(whole).shape == (2, 424, 640)


def test_folds_train_apart() -> None:
    """What a fold predicts does not depend on the rows that other folds learn from."""
    task, loaded = tasks.DETECTOR, data.benign_cells(0)
    other = loaded.train_input.clone()
    other[1] *= 3
    changed = replace(task, load=lambda seed: replace(loaded, train_input=other, train_target=other))
    before, after = (train(t, t.pack, steps=5, folds=3) for t in (task, changed))
    same = [np.array_equal(*pair) for pair in zip(before.prediction, after.prediction)]
    assert same == [True, False, True]


def test_a_fold_gets_the_gradient_that_it_would_get_alone() -> None:
    """Else a threshold on gradients would drop more, the more folds train side by side."""
    task = tasks.ALL_DIGITS
    shares = [train(task, task.pack, steps=1, folds=folds).watched[tasks.ALL_LAYERS][0, 0] for folds in (1, 10)]
    assert shares[0] == pytest.approx(shares[1], rel=0.15)


def test_the_interval_of_a_difference() -> None:
    op, baseline = np.array([0.2, 0.4, 0.6, 0.8]), np.zeros(4)
    difference = compare.Difference.between(op, baseline, held_out=1 / 3)
    assert difference.mean == pytest.approx(0.5)
    # Student's quantile with three degrees of freedom, the deviation of the four, and 1/4 + 1/3
    assert difference.high - difference.mean == pytest.approx(3.182446 * op.std(ddof=1) * math.sqrt(7 / 12), rel=1e-6)
    more, less = (tasks.Measure("", lambda run: op, better) for better in ("more", "less"))
    assert difference.low < 0
    assert difference.verdict(more) == difference.verdict(less) == "within noise"
    clear = compare.Difference.between(op + 10, baseline)
    assert (clear.verdict(more), clear.verdict(less)) == ("better", "worse")


def test_wrong_variants_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pulled(folds: int) -> torch.nn.Module:
        return tt.nn.JumpReLU((folds, 1, tasks.FEATURES), **tasks.JUMP, input_gradient=True)

    wrong = {
        "detector": tasks.DETECTOR.baseline,
        "autoencoder": replace(tasks.AUTOENCODER.pack, activation=pulled),
        "gradients": tasks.ALL_DIGITS.baseline,
    }
    for name, variant in wrong.items():
        monkeypatch.setitem(tasks.TASKS, name, replace(tasks.TASKS[name], pack=variant))
    monkeypatch.setattr(report, "draw", lambda results, path: None)
    assert demo.main(["--device", "cpu", "--steps", "3", "--out", str(tmp_path)]) == demo.DISAGREE
    document = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [name for name, task in document["tasks"].items() if not task["agrees"]] == list(wrong)


def test_it_uses_the_public_names_alone() -> None:
    """So that it stays an example of how to use the pack."""
    for path in (ROOT / "examples").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("triton_thresh"), path
            elif isinstance(node, ast.Import):
                assert all(name.name.partition(".")[2] == "" for name in node.names if "triton_thresh" in name.name), (
                    path
                )


def run_demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "examples.demo", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_triton_on_a_cpu_is_refused(tmp_path: Path) -> None:
    done = run_demo("--device", "cpu", "--backend", "triton", "--out", str(tmp_path / "out"))
    assert done.returncode == demo.CANNOT_RUN
    assert "TRITON_INTERPRET=1" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_named_with_a_way_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda module: None if module == "sklearn" else object())
    assert demo.main([]) == demo.CANNOT_RUN
    message = capsys.readouterr().err
    assert "pip install scikit-learn" in message
    assert "make demo" in message
    assert "triton_thresh[" not in message  # the package is on no index


def test_what_is_named_as_missing_is_what_make_demo_installs() -> None:
    makefile, project = ((ROOT / name).read_text() for name in ("Makefile", "pyproject.toml"))
    assert '"$(TORCH)" numpy;' in makefile
    assert "--group demo\n" in makefile
    group = re.search(r"^demo = (\[.*\])$", project, re.MULTILINE)
    assert group is not None
    assert {"torch", "numpy", *json.loads(group[1])} == set(demo.DISTRIBUTIONS.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch finds a GPU")
def test_a_missing_gpu_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--device", "cuda"]) == demo.CANNOT_RUN
    assert "torch finds no GPU" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--seed", "-1"], ["--steps", "many"]])
def test_bad_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        demo.main(arguments)
    assert refused.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert demo.main(["--device", "cpu", "--out", str(tmp_path / "file")]) == demo.CANNOT_RUN
    assert "file" in capsys.readouterr().err
