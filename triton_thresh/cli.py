"""Command line: ``triton-thresh`` or ``python -m triton_thresh``. Its options of several values serve other commands too."""

from __future__ import annotations

import difflib
import inspect
import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

try:
    import typer
except ModuleNotFoundError:
    raise SystemExit("The command line needs typer: pip install typer") from None
import torch

import triton_thresh as tt

from . import backend, tune, tuning
from .registry import OPS

CANNOT_RUN = 2  # exit code
DTYPES = ("float32", "bfloat16", "float16", "float64")
ONE_OR_MORE = "Several by commas, or by giving the option again."


def new_app(help: str, *, completes: bool = True) -> typer.Typer:
    """A command line in plain text, whose errors are lines and not boxes. A shell completes a script, not ``python -m``."""
    settings = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
    return typer.Typer(
        help=help,
        no_args_is_help=True,
        add_completion=completes,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings=settings,
    )


def run(app: typer.Typer, name: str, arguments: list[str] | None) -> int:
    """The exit code of a command. Nothing is said if its output is not read to the end, as by ``| head``."""
    code: Any
    try:
        try:
            app(arguments, prog_name=name)
        finally:
            sys.stdout.flush()
    except SystemExit as done:
        code = done.code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
        code = 1
    return int(code or 0)


def refuse(message: str) -> typer.Exit:
    """Says why a command cannot run; to be raised."""
    typer.echo(f"Error: {message}", err=True)
    return typer.Exit(CANNOT_RUN)


def split(values: Iterable[str]) -> list[str]:
    """The parts between commas, each once."""
    return list(dict.fromkeys(part.strip() for value in values for part in value.split(",") if part.strip()))


def names(text: str, known: Callable[[], Iterable[str]], *example: str) -> Any:
    """An option of one or more of the names known, completed and checked."""

    def check(values: list[str] | None) -> list[str] | None:
        for name in (asked := split(values or ())):
            check_name(name, tuple(known()))
        return asked or None

    def complete(incomplete: str) -> Iterator[str]:
        before, comma, last = incomplete.rpartition(",")
        return (f"{before}{comma}{name}" for name in known() if name.startswith(last))

    shown = f"{text}, for instance {','.join(example)}. {ONE_OR_MORE}"
    return typer.Option(help=shown, metavar="A,B", callback=check, autocompletion=complete)


def check_name(name: str, known: tuple[str, ...]) -> str:
    """A name that is known; else an error with the names nearest to it."""
    if name not in known:
        near = difflib.get_close_matches(name, known, 3) or known
        raise typer.BadParameter(f"{name!r} is not known; expected one of {', '.join(near)}")
    return name


def exponents(values: list[str] | None) -> list[int] | None:
    """The sizes that were asked for, by numbers and ranges."""
    found: list[int] = []
    for part in split(values or ()):
        low, _, high = part.partition("-")
        if not (low.isdecimal() and (high or low).isdecimal() and int(low) <= int(high or low) <= 40):
            text = f"{part!r} is not known; expected exponents of 2 up to 40, such as 10 or 10-20"
            raise typer.BadParameter(text, param_hint="--sizes")
        found += range(int(low), int(high or low) + 1)
    return list(dict.fromkeys(found)) or None


OpNames = Annotated[list[str] | None, names("Ops (all if not given)", lambda: OPS, "hardshrink", "jumprelu")]
Dtypes = Annotated[list[str] | None, names("Dtypes", lambda: DTYPES, "float32", "bfloat16")]
Sizes = Annotated[
    list[str] | None,
    typer.Option(
        help=f"Elements, as exponents of 2: 10,20-24 is 2^10 and 2^20 to 2^24. {ONE_OR_MORE}",
        metavar="10,20-24",
    ),
]

app = new_app("Say what the ops of triton_thresh would do here, and tune them for a GPU.")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"triton_thresh {tt.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    pass


@app.command()
def ops() -> None:
    """List the ops, with what each computes."""
    wide = max(map(len, OPS))
    for name, _op in OPS.items():
        typer.echo(f"{name:<{wide}}  {inspect.cleandoc(getattr(tt, name).__doc__ or '').splitlines()[0]}")


@app.command()
def info() -> None:
    """Print versions, devices, and what would run on each."""
    typer.echo(f"triton_thresh {tt.__version__} in {Path(tt.__file__).parent}")
    typer.echo(f"Python {platform.python_version()}, torch {torch.__version__}")
    if backend.has_triton():
        import triton

        typer.echo(f"triton {triton.__version__}{' (interpreter)' if backend.interpreting() else ''}")
    else:
        typer.echo("triton is not installed: every op runs in eager torch")
    typer.echo(f"backend asked for: {tt.get_backend()}")
    search = "yes" if tuning.may_search() else "no"
    typer.echo(f"block sizes found by searches: {tuning.table_folder()}; a search may run: {search}")
    for device in (torch.device("cpu"), *_gpus()):
        name = ""
        if device.type != "cpu":
            own = str(torch.get_device_module(device).get_device_name(device))
            name = f" {own}, {len(tuning.table(own))} block sizes found"
        try:
            typer.echo(f"{device}{name}: {' ('.join(backend.choose(device))})")
        except RuntimeError as error:
            typer.echo(f"{device}{name}: nothing runs; {error}")


def _gpus() -> list[torch.device]:
    modules = [(kind, getattr(torch, kind, None)) for kind in sorted(backend.TRITON_DEVICES)]
    return [torch.device(kind, i) for kind, module in modules if module for i in range(module.device_count())]


def _device(text: str | None) -> torch.device:
    """The device of a name, if torch can put a tensor there; a GPU, if there is one, where none is named."""
    try:
        device = torch.device(text or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise typer.BadParameter(
            f"{text!r}: {str(error).splitlines()[0].partition('. ')[0]}", param_hint="--device"
        ) from None
    return device


@app.command()
def explain(
    op: Annotated[
        str,
        typer.Argument(
            help="The op, for instance hardshrink.",
            callback=lambda name: check_name(name, tuple(OPS)),
            autocompletion=lambda incomplete: [name for name in OPS if name.startswith(incomplete)],
        ),
    ],
    numel: Annotated[int, typer.Option(min=0, help="Elements of the input, for instance 4096.")] = 1 << 20,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "float64"], typer.Option(help="The input's dtype.")
    ] = "float32",
    device: Annotated[
        str | None, typer.Option(help="Where the input is, for instance cuda:1 (default: a GPU if there is one).")
    ] = None,
) -> None:
    """Say which code would run for an op, and why.

    It is asked for a training step of that op, with thresholds of 0.5, and the bytes that it would move are counted.
    """
    where = _device(device)
    try:
        input = torch.empty(numel, dtype=getattr(torch, dtype), device=where, requires_grad=True)
        input.grad = torch.empty_like(input)
    except RuntimeError:
        raise typer.BadParameter(f"{numel:,} elements do not fit in memory", param_hint="--numel") from None
    try:
        typer.echo(str(tt.explain(op, *_example(op, input))))
    except RuntimeError as error:  # the backend that TRITON_THRESH_BACKEND asks for cannot run here
        raise refuse(str(error)) from None


def _example(op: str, input: torch.Tensor) -> Iterator[Any]:
    """Arguments for an op: what it needs, thresholds of 0.5."""
    given = {"input": input, "parameters": [input], "target": input.detach(), "rule": tt.ByPrediction()}
    for name, parameter in inspect.signature(getattr(tt, op)).parameters.items():
        if name not in given and parameter.default is not parameter.empty:
            return
        yield given.get(name, 0.5)


@app.command(name="tune")
def tune_(
    ops: OpNames = None,
    dtypes: Dtypes = None,
    sizes: Sizes = None,
    out: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Also write the table there, for instance table.json.")
    ] = None,
) -> None:
    """Search block sizes for the GPU at hand.

    They are kept for later processes.
    """
    try:
        tune.run(ops or list(OPS), dtypes or tune.DTYPES, exponents(sizes) or tune.SIZES, out)
    except tune.CannotTuneError as error:
        raise refuse(f"tune: {error}") from None


def main(arguments: list[str] | None = None) -> int:
    """Run a command, and return its exit code."""
    return run(app, "triton-thresh", arguments)
