"""The command lines of the package and of the benchmarks: help, completion, and words for whatever is typed."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch

pytest.importorskip("typer", reason="the command line is an extra")

import triton_thresh as tt
from benchmarks.__main__ import app as benchmarks_app
from triton_thresh.__main__ import main
from triton_thresh.cli import app, exponents, names, split

from .conftest import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="once is enough")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"triton_thresh {tt.__version__}\n"


def test_ops(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ops"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(tt.ops())
    assert "y = value where x <= threshold else x" in lines[0]


@pytest.mark.parametrize("name", tt.ops())
def test_every_op_is_explained(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", name, "--numel", "1024", "--dtype", "bfloat16", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith(f"{name}: eager (")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["explain", "hardshrnk"], "'hardshrnk' is not known; expected one of hardshrink"),
        (["explain"], "Missing argument 'op'"),
        (["explain", "step", "--numel", "-5"], "--numel"),
        (["explain", "step", "--numel", "many"], "--numel"),
        (["explain", "step", "--numel", str(10**15)], "--numel: 1,000,000,000,000,000 elements do not fit in memory"),
        (
            ["explain", "step", "--dtype", "float8"],
            "'float8' is not one of 'float32', 'bfloat16', 'float16', 'float64'",
        ),
        (["explain", "step", "--device", "gpu"], "--device: 'gpu'"),
        (["tune", "--ops", "step,nothing"], "'nothing' is not known"),
        (["tune", "--dtypes", "float8"], "'float8' is not known"),
        (["tune", "--sizes", "abc"], "--sizes: 'abc' is not known; expected exponents of 2"),
        (["tune", "--sizes", "20-10"], "'20-10' is not known"),
        (["tune", "--sizes", "64"], "'64' is not known"),
        (["tune", "--size", "10"], "No such option"),
        (["twist"], "No such command 'twist'"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_what_is_typed_wrongly_is_said_in_a_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert said in " ".join(error.split())
    assert "Traceback" not in error


def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise AssertionError("Torch not compiled with CUDA enabled. This could be because of many things.")

    monkeypatch.setattr(torch, "empty", missing)
    assert main(["explain", "step", "--device", "cuda"]) == 2
    assert capsys.readouterr().err.endswith("--device: 'cuda': Torch not compiled with CUDA enabled\n")


def test_tune_without_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune"]) == 2
    assert capsys.readouterr().err == "Error: tune: needs a GPU that Triton can drive; torch finds none\n"


def test_several_values_by_commas_and_by_repeating() -> None:
    assert split(["a,b", " c ,a", ""]) == ["a", "b", "c"]
    assert exponents(["10,20-22", "10"]) == [10, 20, 21, 22]
    assert exponents(None) is None


def commands() -> list[Any]:
    """Every command of both command lines."""
    both = [(line, command.callback) for line in (app, benchmarks_app) for command in line.registered_commands]
    return [
        pytest.param(callback, id=f"{'triton_thresh' if line is app else 'benchmarks'} {callback.__name__}")
        for line, callback in both
        if callback
    ]


@pytest.mark.parametrize("command", commands())
def test_every_option_has_words_and_an_example(command: Callable[..., Any]) -> None:
    assert (command.__doc__ or "").splitlines()[0].endswith(".")
    hints = get_type_hints(command, include_extras=True)
    for name in set(inspect.signature(command).parameters) - {"context"}:
        kind, option = get_args(hints[name])
        assert option.help, name
        if kind is not bool and get_origin(kind) is not Literal:
            assert "for instance" in option.help or "10,20-24" in option.help, name


def test_names_are_completed_after_a_comma() -> None:
    complete = names("Ops", lambda: tt.ops(), "step").autocompletion
    assert list(complete("hard")) == ["hardshrink"]
    assert list(complete("step,jumprelu_")) == ["step,jumprelu_l0"]


@pytest.mark.slow
def test_what_reads_the_output_may_stop() -> None:
    shell = f"{sys.executable} -m triton_thresh ops | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
