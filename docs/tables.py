"""Tables of the pages and of the README: made from the registry by running its ops, and from committed result files."""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import triton_thresh as tt
from benchmarks import records
from benchmarks.records import Record
from benchmarks.run import PACK
from benchmarks.tables import Row, described, fullest, markdown, rows, size, steps
from benchmarks.workloads import family
from triton_thresh.functional import function_of

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
INF, NAN = float("inf"), float("nan")
T, BANDWIDTH = 0.5, 0.25

# --------------------------------------------------------------------------------------------------- from the registry


def _family(*names: str) -> list[Any]:
    return [op for op in tt.ops().values() if family(op) in names]


def _named(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


FAMILIES = {
    "Activations": (("gate",), "`tt.nn.Threshold`, `Hardshrink`, `Softshrink`, `BinaryThreshold`"),
    "Thresholds that learn": (("learned",), "`tt.nn.JumpReLU`"),
    "Losses": (("loss",), "`tt.nn.ThresholdLoss`, and one for each named loss; `fused_loss` for your own"),
    "Gradients": (("gradient", "foreach"), "`tt.GradientThreshold(optimizer, t)`"),
}
FROM_DATA = ("topk_threshold", "quantile_threshold", "otsu_threshold", "batch_topk")  # which have no rows


def glance() -> str:
    """The ops of each family, for the README."""
    lines = [[head, _named(op.name for op in _family(*kinds)), also] for head, (kinds, also) in FAMILIES.items()]
    lines.append(["Thresholds from the data", _named(FROM_DATA), "`tt.nn.BatchTopK`"])
    return markdown(["family", "functions, in `tt`", "modules and hooks"], lines, left=3)


def _reference(name: str) -> str:
    return f"[`{name}`][triton_thresh.{name}]"


def formulas() -> str:
    """Every op with its formula and its gradient."""
    gates = [[_reference(op.name), op.formula, op.gradient] for op in _family("gate", "learned")]
    losses = [[_reference(op.name), op.formula, op.weighing] for op in _family("loss")]
    gradients = [[_reference(op.name), op.subject, op.passes] for op in _family("gradient", "foreach")]
    return "\n\n".join(
        [
            markdown(["activation", "value y", "gradient dy/dx"], gates, left=3),
            markdown(["loss", "loss of an element", "its weight"], losses, left=3),
            markdown(["gradient op", "gradient of", "what passes"], gradients, left=3),
        ]
    )


def _number(value: Tensor) -> str:
    number = value.item()
    return {INF: "∞", -INF: "-∞"}.get(number, "NaN" if number != number else f"{number:.4g}")


def _leaf(*values: float) -> Tensor:
    return torch.tensor(values).unsqueeze(-1).requires_grad_()


def _gradients(output: Tensor, *leaves: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(output.sum(), leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves)]


def gate_points() -> str:
    """y and dy/dx of every gate where it matters, for a threshold of 0.5 (and a high one of 1)."""
    points = {"x = t": T, "x = -t": -T, "x = NaN": NAN, "x = ∞": INF, "x = -∞": -INF}
    lines = []
    for op in _family("gate"):
        x, thresholds = _leaf(*points.values()), (T, *op.example[1 : op.operands])
        y = function_of(op)(x, *thresholds)
        pairs = zip(y, _gradients(y, x)[0]) if y.requires_grad else zip(y)
        call = f"`{op.name}({', '.join(['x', *map(str, thresholds)])})`"
        lines.append([call, *(", ".join(map(_number, pair)) for pair in pairs)])
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
    for name in ("jumprelu", "step"):
        x, t = _leaf(*points.values()), torch.full((len(points), 1), T, requires_grad=True)
        y = getattr(tt, name)(x, t, BANDWIDTH)
        shown = [", ".join(map(_number, values)) for values in zip(y, *_gradients(y, x, t))]
        lines.append([f"`{name}(x, {T}, {BANDWIDTH})`", *shown])
    return markdown(["y, dy/dx, dy/dθ", *points], lines, left=len(points) + 1)


def loss_points() -> str:
    """Element loss and gradient of the named losses for a target of 1, where it matters."""
    points = {"x = 1.5": 1.5, "x = NaN": NAN, "x = ∞": INF, "x = -∞": -INF}
    lines = []
    for op in _family("loss"):
        if op.name == "threshold_loss":
            continue
        x = _leaf(*points.values())
        settings = {"threshold": T} if "threshold" in inspect.signature(function_of(op)).parameters else {}
        loss = getattr(tt, op.name)(x, torch.ones_like(x), reduction="none", **settings)
        shown = [f"{_number(a)}, {_number(b)}" for a, b in zip(loss, _gradients(loss, x)[0])]
        lines.append([f"`{op.name}({', '.join(['x, 1', *map(str, settings.values())])})`", *shown])
    return markdown(["loss, dloss/dx", *points], lines, left=len(points) + 1)


CELLS = {  # a probability and a target
    "true positive": (0.88, 1.0),
    "false alarm": (0.88, 0.0),
    "missed positive": (0.12, 1.0),
    "true negative": (0.12, 0.0),
}


def _costs(rule: Any = None, **settings: Any) -> list[str]:
    """The cost of an element of each cell of the confusion matrix; without a rule, the plain loss."""
    p, y = (torch.tensor(column, dtype=torch.float64) for column in zip(*CELLS.values()))
    rule = tt.ByPrediction(T, 1.0, 1.0) if rule is None else rule
    found = tt.threshold_loss(p.logit(), y, rule, reduction="none", **settings)
    return [f"{cost:.2g}" for cost in found.tolist()]


def _cost_table(kinds: dict[str, list[str]]) -> str:
    return markdown(["cost of one row", *CELLS], [[kind, *costs] for kind, costs in kinds.items()])


def costs() -> str:
    """The four costs of the README's loss."""
    missed = tt.ByOutcome(false_negative=10.0)
    return _cost_table({"plain BCE": _costs(), "a missed positive ten times, as above": _costs(missed)})


def rule_costs() -> str:
    """The same for every way to weigh."""
    return _cost_table(
        {
            "plain BCE": _costs(),
            "`pos_weight=9`": _costs(pos_weight=9.0),
            "`ByPrediction(0.5, 1.0, 0.1)`": _costs(tt.ByPrediction(T, 1.0, 0.1)),
            "`ByLoss(1.0, 2.0)`": _costs(tt.ByLoss(1.0, 2.0)),
            "`ByConfidence(0.5, 2.0)`": _costs(tt.ByConfidence(T, 2.0)),
            "`Focal(0.25, 2.0)`": _costs(base=tt.Focal()),
            "`Asymmetric()`": _costs(base=tt.Asymmetric()),
            "`ByOutcome(0.5, 1.0, 2.0, 10.0, 1.0)`": _costs(tt.ByOutcome(T, 1.0, 2.0, 10.0, 1.0)),
        }
    )


def explained() -> str:
    """The words of `explain` for two calls."""
    calls = ('tt.explain("hardshrink", torch.randn(1024), 0.5)', 'tt.explain("step", torch.randn(8, 512), 0.5)')
    lines = [f">>> print({call})\n{eval(call, {'tt': tt, 'torch': torch})}" for call in calls]
    return "```pycon\n" + "\n".join(lines) + "\n```"


# ----------------------------------------------------------------------------------------------------- from result files


def loaded(name: str) -> Any:
    path = RESULTS / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def counted() -> list[dict[str, Any]]:
    """Bytes an element of a training step, by op and dtype: eager, compiled, this; None where there is no such form."""
    return list(loaded("bytes.json"))


COUNTED = {"eager": "eager", "compiled": "compiled", "compiled_grad": "compiled as one", "this": PACK}


def bytes_of_a_step() -> str:
    """Bytes of a training step in float32, and how many times fewer than eager that is in float32 and bfloat16."""
    found = {(line["op"], line["dtype"]): line for line in counted()}
    lines = []
    for (op, dtype), line in found.items():
        if dtype == "float32":
            figures = [two_digits(line[kind], 3) for kind in COUNTED]
            both = (found[op, name] for name in ("float32", "bfloat16"))
            ratios = [two_digits(each["eager"] / each["this"]) for each in both]
            lines.append([f"`{op}`", *figures, *ratios])
    return markdown(["op", *COUNTED.values(), "eager / this", "in bfloat16"], lines)


def _newest() -> list[list[Record]]:
    """The newest results of each device, GPUs first."""
    return sorted((records.read(path) for path in records.newest()), key=lambda found: found[0].on_cpu)


def _others(found: list[Row]) -> list[str]:
    """Everything that was measured beside this package."""
    return list(dict.fromkeys(name for row in found for name in row.by if name != PACK))


def _head(found: list[Record]) -> str:
    note = " This is a CPU: it says nothing about a GPU." if found[0].on_cpu else ""
    return f"{described(found[0].stamp, [record.timestamp for record in found])}.{note}"


def two_digits(value: float | None, digits: int = 2) -> str:
    """The digits that another machine of the kind would show too, without an exponent."""
    return "–" if value is None else f"{float(f'{value:.{digits}g}'):g}"


def times() -> str:
    """Forward and backward at the largest size at which every op was measured, every provider."""
    parts = []
    for found in _newest():
        trained = steps(rows(found))
        largest = fullest(trained)
        shown = [row for row in trained if row.numel == largest]
        others = _others(shown)
        heads = ["op", "dtype", *others, PACK, *(f"{name} / {PACK}" for name in others)]
        lines = [
            [
                f"`{row.op}`",
                row.dtype,
                *(two_digits(row.ms(name)) for name in (*others, PACK)),
                *(two_digits(row.speedup(name)) for name in others),
            ]
            for row in shown
        ]
        parts += [f"{_head(found)} Medians in ms, at {size(largest)} elements.", markdown(heads, lines, left=2)]
    return "\n\n".join(parts)


def pays() -> str:
    """Which provider is fastest, for each op and size, in float32, and how many times as fast as this package it is."""
    parts = []
    for found in _newest():
        trained = [row for row in steps(rows(found)) if row.dtype == "float32"]
        sizes = sorted({row.numel for row in trained})
        cells: dict[str, dict[int, str]] = {}
        for row in trained:
            ms, fastest = min((ms, name) for name in row.by if (ms := row.ms(name)) is not None)
            this = row.ms(PACK)
            times = f" {two_digits(this / ms)}×" if this and fastest != PACK else ""
            cells.setdefault(row.op, {})[row.numel] = f"**{fastest}**" if fastest == PACK else fastest + times
        lines = [[f"`{op}`", *(fastest.get(numel, "–") for numel in sizes)] for op, fastest in cells.items()]
        parts += [f"{_head(found)}", markdown(["op", *map(size, sizes)], lines, left=1 + len(sizes))]
    return "\n\n".join(parts)


def gpu_note() -> str:
    """Said as long as no committed result file is a GPU's."""
    if all(found[0].on_cpu for found in _newest()):
        said = "No speed on a GPU has been measured, so no such figure is given here."
        return f'!!! warning "Not measured on a GPU yet"\n\n    {said}'
    return "GPU figures come first below, each with its device, driver, versions and commit."


def _reports() -> list[tuple[Path, list[dict[str, Any]]]]:
    files = sorted((RESULTS / "compile").glob("*/report.jsonl"))
    return [(file.parent, [json.loads(line) for line in file.read_text().splitlines()]) for file in files]


def compiled() -> str:
    """Instructions an element of every op, bfloat16; and where all of it is."""
    parts = []
    for folder, lines in _reports():
        targets = list(dict.fromkeys(line["target"] for line in lines))
        most: dict[str, dict[tuple[str, str], float]] = {}
        for line in lines:
            if line["dtype"] != "bf16" or (line["operands"] == "-" and "backward" not in line["kernel"]):
                continue
            way = "backward" if "backward" in line["kernel"] else "forward"
            found = most.setdefault(line["op"], {})
            found[line["target"], way] = max(found.get((line["target"], way), 0), line["instructions_per_element"])
        spills = sum(bool(line["spills"]) for line in lines)
        links = ", ".join(f"[{target}]({(folder / target).relative_to(ROOT).as_posix()}.md)" for target in targets)
        parts.append(
            f"Triton {lines[0]['triton']}, commit {lines[0]['commit']}: {len(lines):,} kernels, {spills or 'none'} of them "
            f"spilling. A cell has the most instructions that an element takes forward and backward, in bfloat16, over "
            f"all kinds of thresholds. Registers, vector widths and every single kernel: {links}."
        )
        table = []
        for op, found in most.items():
            both = ([found.get((target, way)) for way in ("forward", "backward")] for target in targets)
            cells = (" / ".join("–" if count is None else f"{count:.1f}" for count in pair) for pair in both)
            table.append([f"`{op}`", *cells])
        parts.append(markdown(["op, forward / backward", *targets], table))
    return "\n\n".join(parts)


def errors() -> str:
    """The largest errors of each loss on compiled kernels that were executed."""
    table = []
    for row in loaded("ptx/accuracy.json"):
        cells = [f"`{row['base']}`", f"`{row['rule']}`"]
        for kind in ("loss", "gradient"):
            found = row[kind]
            wrong = max(found[mode] for mode in ("random", "plus", "minus"))
            cells += [f"{value:.2g}" for value in (found["eager"], found["exact"], wrong)]
        table.append(cells)
    heads = ("eager torch", "kernel", "kernel, as wrong as documented")
    return markdown(
        ["base", "rule", *(f"{kind}: {head}" for kind in ("loss", "gradient") for head in heads)], table, left=2
    )


def pictures() -> str:
    """The pictures of each device's newest results."""
    shown = []
    for path in sorted(records.newest(), key=lambda path: records.read(path)[0].on_cpu):
        first = records.read(path)[0]
        shown.append(f"### Pictures: {first.device}" + (" (a CPU: not GPU figures)" if first.on_cpu else ""))
        for picture in sorted(path.with_suffix("").glob("*.png")):
            shown.append(f"![{picture.stem}]({picture.relative_to(ROOT).as_posix()})")
    return "\n\n".join(shown)


# -------------------------------------------------------------------------------------------------- hardware and versions

HARDWARE = {
    "H100, H200": "sm_90",
    "A100, A30": "sm_80",
    "B200": "sm_100",
    "MI300X, MI300A": "gfx942",
    "A10, RTX 30": "sm_86",
    "L4, L40S, RTX 40": "sm_89",
    "RTX 50": "sm_120",
    "T4, RTX 20": "sm_75",
}


def _is_one_of(device: str, names: str) -> bool:
    """If this device is one of these names: "NVIDIA A100" is not an A10, "NVIDIA GeForce RTX 2080 Ti" is an RTX 20."""
    return any(re.search(rf"\b{name}([5-9]0)?\b", device) for name in names.split(", "))


def compiled_for() -> dict[str, str]:
    """How the kernels compiled for each target, by the report and by targets.json."""
    made: dict[str, str] = {}
    for _, lines in _reports():
        for target in dict.fromkeys(line["target"] for line in lines):
            spills = sum(bool(line["spills"]) for line in lines if line["target"] == target)
            made[target] = _yes(spills, lines[0]["triton"])
    others = loaded("targets.json")
    for target, counts in (others or {}).items():
        made[target] = _yes(counts["spills"], counts["triton"])
    return made


def _yes(spills: int, triton: str) -> str:
    return f"yes, by Triton {triton}" + (
        f"; {spills} kernel{'s' * (spills > 1)} spill{'s' * (spills == 1)}" if spills else ""
    )


def hardware() -> str:
    """The hardware, with what was done on it or for it."""
    made, devices = compiled_for(), [found[0].stamp.device for found in _newest() if not found[0].on_cpu]
    lines = []
    for name, target in HARDWARE.items():
        measured = [device for device in devices if _is_one_of(device, name)]
        tested = [run["device"] for run in loaded("gpu-tests.json") if _is_one_of(run["device"], name)]
        lines.append(
            [name, f"`{target}`", made.get(target, "no"), *[", ".join(tested) or "no"] * 2, ", ".join(measured) or "no"]
        )
    cpus = ", ".join(found[0].stamp.device for found in _newest() if found[0].on_cpu)
    lines.append(["x86-64 CPU, Linux", "–", "–", "–", "eager path; kernels in Triton's interpreter", cpus])
    return markdown(["hardware", "target", "compiled", "executed", "tests run", "time measured"], lines, left=6)


def versions() -> str:
    """The combinations of Python, torch and Triton that `make versions` tested."""
    path = ROOT / "tests" / "versions.json"
    if not path.exists():
        return "`make versions` has not been run yet."
    lines = [
        [
            *(row[name] or "–" for name in ("python", "torch", "triton", "platform")),
            str(row["passed"]),
            str(len(row["failed"])),
        ]
        for row in json.loads(path.read_text(encoding="utf-8"))
    ]
    return markdown(["Python", "torch", "Triton", "platform", "tests passed", "failed"], lines, left=4)


def status() -> str:
    """The README's box."""
    reports = _reports()
    count, spills = (
        sum(len(lines) for _, lines in reports),
        sum(bool(k["spills"]) for _, lines in reports for k in lines),
    )
    names = {target: name for name, target in HARDWARE.items()}
    reported = dict.fromkeys(line["target"] for _, lines in reports for line in lines)
    targets = ", ".join(f"{names[target]} ({target})" for target in reported)
    measured = ", ".join(found[0].stamp.device for found in _newest())
    on_gpu = any(not found[0].on_cpu for found in _newest())
    tested = ", ".join(f"{run['device']}: {run['passed']:,} tests pass" for run in loaded("gpu-tests.json"))
    lines = [
        ["State", f"alpha, version {tt.__version__}: before 1.0 a minor version may change names"],
        ["Correct", "every op against plain torch, on every change, with the kernels in Triton's interpreter"],
        ["Compiled for", f"{targets}: {count:,} kernels, {spills or 'none'} of them spilling"],
        [
            "Executed",
            f"{tested}. On every change the PTX for sm_90, by an interpreter on a CPU: a share of the kernels' tests",
        ],
        ["Measured", f"bytes: counted. Time: {measured}" + ("" if on_gpu else "; **no GPU yet**")],
    ]
    return markdown(["status", ""], lines, left=2)


# --------------------------------------------------------------------------------------------------------- from the tree


def tutorials() -> str:
    """The notebooks with the first paragraph of each."""
    parts = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        first = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
        title, _, text = first.partition("\n")
        paragraph = re.sub(":$", ".", text.strip().partition("\n\n")[0])
        parts.append(f"## [{title.lstrip('# ')}](notebooks/{path.name})\n\n{paragraph}")
    return "\n\n".join(parts)


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
    folders = ("triton_thresh", "kernels")
    for path in (path for folder in folders for path in sorted((ROOT / folder).glob("*.py"))):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        says = (ast.get_docstring(tree) or "").split("\n\n")[0].replace("\n", " ").replace("<", "&lt;")
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
        used = {_file(path.parents[node.level - 1], node.module, a.name) for node in imports for a in node.names}
        if says and path.name != "__init__.py":
            name = path.relative_to(ROOT).as_posix()
            lines.append([f"`{name}`", says, ", ".join(f"`{name}`" for name in sorted(filter(None, used)))])
    return markdown(["file", "what it is", "uses"], lines, left=3)
