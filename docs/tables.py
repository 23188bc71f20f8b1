"""Tables of the pages, made from the registry by running its ops, and from committed result files."""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import triton_thresh as tt
from benchmarks import records
from benchmarks.tables import markdown
from triton_thresh.checks import FLOATING
from triton_thresh.families import ForeachGate, Gate, LearnedGate, Loss
from triton_thresh.registry import OPS
from triton_thresh.table import op_table

ROOT = Path(__file__).parents[1]
INF, NAN = float("inf"), float("nan")
T, BANDWIDTH = 0.5, 0.25
SHAPE = (1024, 1024)


def ops() -> str:
    """The table of the README."""
    return op_table()


GATES = [op for op in OPS.values() if isinstance(op, Gate)]
LEARNED = [op for op in OPS.values() if isinstance(op, LearnedGate)]
LOSSES = [op for op in OPS.values() if isinstance(op, Loss)]


def _number(value: Tensor) -> str:
    number = value.item()
    return {INF: "∞", -INF: "-∞"}.get(number, "NaN" if number != number else f"{number:.4g}")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _leaf(*values: float) -> Tensor:
    return torch.tensor(values).unsqueeze(-1).requires_grad_()


def _gradients(output: Tensor, *leaves: Tensor) -> list[Tensor]:
    if not output.requires_grad:
        return [torch.full_like(leaf, NAN) for leaf in leaves]
    found = torch.autograd.grad(output.sum(), leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves)]


def gate_points() -> str:
    """y and dy/dx of every gate where it matters, for a threshold of 0.5."""
    points = {"x = t": T, "x = -t": -T, "x = NaN": NAN, "x = ∞": INF, "x = -∞": -INF}
    lines = []
    for op in GATES:
        x = _leaf(*points.values())
        y = op(x, T, *op.example[1:])
        (dx,) = _gradients(y, x)
        shown = [f"{_number(a)}, {_number(b)}" if op.differentiable else _number(a) for a, b in zip(y, dx)]
        call = ", ".join(["x", str(T), *(f"{number:g}" for number in op.example[1:])])
        lines.append([f"`{op.name}({call})`", *shown])
    return markdown(["y, dy/dx", *points], lines, left=len(points) + 1)


def learned_points() -> str:
    """y, dy/dx and the gradient of a threshold of 0.5 with a bandwidth of 0.25."""
    points = {
        "x = θ": T,
        "x = θ + ε/4": T + BANDWIDTH / 4,
        "x = θ - ε/4": T - BANDWIDTH / 4,
        "x = θ ± ε/2": T + BANDWIDTH / 2,
    }
    points |= {"x = NaN": NAN, "x = ∞": INF, "x = -∞": -INF}
    lines = []
    for op in LEARNED:
        x, t = _leaf(*points.values()), torch.full((len(points), 1), T, requires_grad=True)
        outputs = op(x, t, BANDWIDTH)
        y = outputs[0] if op.counts else outputs
        dx, dt = _gradients(sum(output.sum() for output in outputs) if op.counts else y, x, t)
        shown = [", ".join(map(_number, values)) for values in zip(y, dx, dt)]
        if op.counts:
            shown = [
                f"({_number(a)}, {_number(count)}){of[len(_number(a)) :]}" for a, count, of in zip(y, outputs[1], shown)
            ]
        lines.append([f"`{op.name}(x, 0.5, 0.25)`", *shown])
    return markdown(["y, dy/dx, dy/dθ", *points], lines, left=len(points) + 1)


def _settings(op: Loss) -> dict[str, Any]:
    return {} if op.name in ("exceedance_mse_loss", "threshold_bce_loss") else {"threshold": T}


def loss_points() -> str:
    """Element loss and gradient of the named losses for a target of 1, where it matters, and the weight at the threshold."""
    points = {"x = 1.5": 1.5, "x = NaN": NAN, "x = ∞": INF, "x = -∞": -INF}
    lines = []
    for op in LOSSES:
        if op.rule is None:
            continue
        call = getattr(tt, op.name)
        settings = _settings(op)
        at = 0.0 if op.base == "bce_with_logits" or op.rule is tt.ByLoss else float(settings.get("threshold", 0.7))
        bare = tt.threshold_loss(torch.tensor([at]), torch.ones(1), tt.ByLoss(INF), base=op.base, reduction="none")
        weighed = call(torch.tensor([at]), torch.ones(1), reduction="none", **settings)
        x = _leaf(*points.values())
        loss = call(x, torch.ones_like(x), reduction="none", **settings)
        (dx,) = _gradients(loss, x)
        shown = [f"{_number(a)}, {_number(b)}" for a, b in zip(loss, dx)]
        arguments = ", ".join(["x, 1", *(f"{value:g}" for value in settings.values())])
        lines.append([f"`{op.name}({arguments})`", _number(weighed / bare), *shown])
    return markdown(["loss, dloss/dx", "weight at the threshold", *points], lines, left=len(points) + 2)


def dtypes() -> str:
    """What each op takes and gives, and the precision of its comparison."""
    lines = []
    for op in OPS.values():
        if isinstance(op, Gate):
            output = "the input's, or `dtype`" if not op.casts else "the input's"
            compared = "input's dtype; tensors with dimensions: promoted"
            lines.append([f"`{op.name}`", _names(op.dtypes), output, compared])
        elif isinstance(op, LearnedGate):
            output = "the input's; the count float32 (float64 of float64)" if op.counts else "the input's"
            lines.append([f"`{op.name}`", _names(op.dtypes), output, "float32 or wider"])
        elif isinstance(op, Loss):
            lines.append([f"`{op.name}`", _names(FLOATING), LOSS_OUTPUT, "float32 (float64 of float64)"])
        else:
            lines.append([f"`{op.name}`", _names(op.gate.dtypes), "the input's", "gradient's dtype; tensors: promoted"])
    return markdown(["op", "input", "output", "compared in"], lines, left=4)


LOSS_OUTPUT = "the input's; float32 under autocast"


def _operand(kind: str, dtype: torch.dtype) -> Any:
    shapes: Mapping[str, tuple[int, ...]] = {"per column": SHAPE[1:], "per element": SHAPE}
    return torch.empty(shapes[kind], dtype=dtype, device="meta") if kind in shapes else T


def _byte_rows() -> Iterator[tuple[str, str, torch.dtype, Any, tuple[Any, ...], dict[str, Any]]]:
    for op in OPS.values():
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.empty(SHAPE, dtype=dtype, device="meta", requires_grad=True)
            if isinstance(op, Loss):
                if op.rule is None:
                    continue
                rule = op.rule(T) if op.rule is not tt.ByLoss else op.rule()
                for reduction in ("mean", "none"):
                    yield op.name, reduction, dtype, x, (x.detach(), *vars(rule).values()), {"reduction": reduction}
                if dtype is torch.bfloat16:
                    half = x.detach().half().requires_grad_()
                    arguments = (half.detach(), *vars(rule).values())
                    yield op.name, "mean", torch.float16, half, arguments, {"reduction": "mean"}
            elif isinstance(op, LearnedGate):
                theta = torch.empty(SHAPE[1:], device="meta", requires_grad=True)
                yield op.name, "per column, learns", dtype, x, (theta,), {}
            elif isinstance(op, ForeachGate):
                parameter = x.detach()
                parameter.grad = torch.empty_like(parameter)
                yield op.name, "number", dtype, [parameter], (T,), {}
            else:
                for kind in ("number", "per column", "per element"):
                    yield op.name, kind, dtype, x, (_operand(kind, dtype),), {}


def bytes_moved() -> str:
    """Bytes an element, forward, backward and saved, of a [1024, 1024] input that requires grad."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, kind, dtype, x, arguments, keywords in _byte_rows():
        bound = inspect.signature(getattr(tt, name)).bind(x, *arguments, **keywords)
        bound.apply_defaults()
        tensors = [value for value in bound.args[1:] if isinstance(value, Tensor)]
        counts = OPS[name].bytes_moved(x, tensors, bound.arguments, grad=True)
        size = SHAPE[0] * SHAPE[1]
        row = (kind, _names((dtype,)), *(f"{count / size:.4g}" for count in counts))
        alike.setdefault(row, []).append(f"`{name}`")
    lines = [[", ".join(names), *row] for row, names in alike.items()]
    return markdown(["op", "threshold, or reduction", "dtype", "forward", "backward", "saved"], lines, left=3)


def gpu_note() -> str:
    """Said as long as no committed result file is a GPU's."""
    if all(records.read(path)[0].on_cpu for path in records.newest()):
        said = "No speed on a GPU has been measured, so no such figure is given here."
        return f'!!! warning "Not measured on a GPU yet"\n\n    {said}'
    return "GPU figures come first below, each with its device, driver, versions and commit."


def compiled() -> str:
    """Instructions an element and registers of each op's forward and backward, bfloat16; and where all of it is."""
    parts = []
    for file in sorted((records.RESULTS / "compile").glob("*/report.jsonl")):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        targets = list(dict.fromkeys(line["target"] for line in lines))
        table: dict[tuple[str, str], dict[str, str]] = {}
        for line in lines:
            plain = line["operands"] in ("number", "-", "scalar", "numbers", "per-feature")
            if line["dtype"] == "bf16" and plain:
                shown = f"{line['instructions_per_element']:.1f}, {line['registers']}"
                table.setdefault((line["op"], f"{line['kernel']} {line['operands']}".removesuffix(" -")), {})[
                    line["target"]
                ] = shown
        spills = sum(bool(line["spills"]) for line in lines)
        links = ", ".join(f"[{target}]({(file.parent / target).relative_to(ROOT).as_posix()}.md)" for target in targets)
        parts.append(
            f"Triton {lines[0]['triton']}, commit {lines[0]['commit']}: {len(lines)} kernels, {spills or 'none'} of them "
            f"with spills. Each cell: instructions an element, registers a thread, for bfloat16 and thresholds that are "
            f"numbers. Every kernel, dtype and kind of operand: {links}."
        )
        rows = [
            [f"`{op}`", kernel, *(found.get(target, "–") for target in targets)]
            for (op, kernel), found in table.items()
        ]
        parts.append(markdown(["op", "kernel", *targets], rows, left=2))
    return "\n\n".join(parts)


def pictures() -> str:
    """The pictures of each device's newest results."""
    shown = []
    for path in sorted(records.newest(), key=lambda path: records.read(path)[0].on_cpu):
        first = records.read(path)[0]
        shown.append(f"### Pictures: {first.device}" + (" (a CPU: not GPU figures)" if first.on_cpu else ""))
        for picture in sorted(path.with_suffix("").glob("*.png")):
            shown.append(f"![{picture.stem}]({picture.relative_to(ROOT).as_posix()})")
    return "\n\n".join(shown)


def _file(folder: Path, module: str | None, name: str) -> str | None:
    """The file that `from <folder>.<module> import <name>` reads, without its ending; None if it is not the package's own."""
    place = folder.joinpath(*(module.split(".") if module else ()))
    if place == ROOT / "triton_thresh" / "kernels":
        place = ROOT / "kernels"
    for path in (place / f"{name}.py", place.with_suffix(".py"), place / "__init__.py"):
        if path.is_file():
            return (
                path.relative_to(ROOT)
                .as_posix()
                .removesuffix(".py")
                .removeprefix("triton_thresh/")
                .removesuffix("/__init__")
            )
    return None


def files() -> str:
    """Every file of the package: its own first sentence, and which others it uses."""
    lines = []
    folders = ("triton_thresh", "triton_thresh/families", "kernels")
    for path in (path for folder in folders for path in sorted((ROOT / folder).glob("*.py"))):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        says = (ast.get_docstring(tree) or "").split("\n\n")[0].replace("\n", " ")
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
        used = {_file(path.parents[node.level - 1], node.module, a.name) for node in imports for a in node.names}
        if says and path.name != "__init__.py":
            name = path.relative_to(ROOT).as_posix()
            lines.append([f"`{name}`", says, ", ".join(f"`{name}`" for name in sorted(filter(None, used)))])
    return markdown(["file", "what it is", "uses"], lines, left=3)
