"""Pictures of records. They are drawn 7 inches wide, so that their text is legible 1400 and 400 pixels wide."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from PIL import Image

from benchmarks.run import COMPILE, EAGER, GRAD, ONE_PASS, OTHERS, PACK, PROVIDERS
from benchmarks.tables import Row
from benchmarks.traffic import Traffic

WIDTH, DPI, FONT = 7.0, 200, 11  # 1400 pixels; at 400 pixels a line of text is 9 pixels high
# Okabe and Ito's colours, told apart with every kind of colour vision; each provider has a marker of its own too.
COLORS = {EAGER: "#555555", COMPILE: "#E69F00", GRAD: "#009E73", PACK: "#0072B2", ONE_PASS: "#56B4E9"}
MARKERS = {EAGER: "s", COMPILE: "^", GRAD: "v", PACK: "o", ONE_PASS: "D"}
LIGHT = "#dddddd"

mpl.rcParams.update({"font.size": FONT, "svg.fonttype": "none", "svg.hashsalt": "triton_thresh"})  # text stays text


def png(figure: Figure, dpi: int = DPI) -> bytes:
    """The figure in 64 colours: a third of the bytes, and no difference to see."""
    drawn, stored = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, dpi=dpi, format="png")
    picture = Image.open(drawn).convert("RGB").quantize(64, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    picture.save(stored, format="png", optimize=True, dpi=(dpi, dpi))
    return stored.getvalue()


def save(figure: Figure, path: Path) -> list[Path]:
    """As PNG and SVG beside each other, the same bytes for the same records."""
    made = [path.parent / f"{path.name}.{kind}" for kind in ("png", "svg")]
    made[0].write_bytes(png(figure))
    figure.savefig(made[1], metadata={"Date": None})
    return made


def clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=LIGHT, linewidth=0.6)
    axes.set_axisbelow(True)


def bytes_moved(found: Sequence[Traffic], note: str) -> Figure | None:
    """The bytes an element that a training step moves, counted."""
    fields = {EAGER: "eager", COMPILE: "compiled", GRAD: "compiled_grad", PACK: "this"}

    def draw(axes: Axes, values: Sequence[float]) -> None:
        axes.set_xscale("log", base=2)
        exponents = range(math.floor(math.log2(min(values))), math.ceil(math.log2(max(values))) + 1)
        axes.set_xticks([2.0**e for e in exponents], [f"{2**e:g}" for e in exponents])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("bytes per element")

    title = "Bytes that a training step moves: counted, not measured"
    return _by_op(found, tuple(fields), lambda line, name: getattr(line, fields[name]), draw, title, note)


def speedup(found: Sequence[Row], note: str) -> Figure | None:
    """How many times as long each baseline takes."""

    def draw(axes: Axes, values: Sequence[float]) -> None:
        low, high = min(0.5, *values) / 1.2, max(2.0, *values) * 1.2
        axes.axvline(1, color="black", linewidth=1.2)
        axes.set_xscale("log", base=2)
        exponents = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
        ticks = [2.0**e for e in exponents if e % -(-len(exponents) // 7) == 0]
        axes.set_xticks(ticks, [f"{t:g}×" if t >= 1 else f"1/{1 / t:g}×" for t in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(xlim=(low, high), xlabel="its time / this package's time")

    title = "Right of 1×: this package is faster"
    return _by_op(found, OTHERS, lambda row, name: row.speedup(name), draw, title, note)


def share_of_copy(found: Sequence[Row], note: str) -> Figure | None:
    """The bytes that the op must move, over the time it takes, as a share of a copy's bandwidth."""

    def share(row: Row, provider: str) -> float | None:
        record = row.by.get(provider)
        return 100 * record.copy_fraction if record and record.copy_fraction else None

    def draw(axes: Axes, values: Sequence[float]) -> None:
        axes.axvline(100, color="black", linewidth=1.2)
        axes.set(xlim=(0, 1.05 * max(100.0, *values)), xlabel="% of a copy's bandwidth")

    return _by_op(found, PROVIDERS, share, draw, "How close each comes to a copy of the same size", note)


def memory(found: Sequence[Row], note: str) -> Figure | None:
    """Peak memory beyond the inputs, in bytes an element."""

    def peak(row: Row, provider: str) -> float | None:
        record = row.by.get(provider)
        return None if record is None or record.peak_bytes is None else record.peak_bytes / row.numel

    def draw(axes: Axes, values: Sequence[float]) -> None:
        axes.set(xlim=(0, 1.05 * max(1.0, *values)), xlabel="bytes per element")

    return _by_op(found, PROVIDERS, peak, draw, "Peak memory beyond the inputs", note)


def _by_op(
    found: Sequence[Any],
    providers: Sequence[str],
    value: Callable[[Any, str], float | None],
    draw: Callable[[Axes, Sequence[float]], None],
    title: str,
    note: str,
) -> Figure | None:
    """A panel for each dtype, a line for each op, a mark for each provider. What is found has an op and a dtype."""
    values = [x for row in found for name in providers if (x := value(row, name)) is not None]
    if not values:
        return None
    ops = list(dict.fromkeys(row.op for row in found))
    dtypes = list(dict.fromkeys(row.dtype for row in found))
    figure = Figure(figsize=(WIDTH, (0.29 * len(ops) + 0.9) * len(dtypes) + 1.5), layout="constrained")
    panels = figure.subplots(len(dtypes), 1, squeeze=False)[:, 0]
    for axes, dtype in zip(panels, dtypes):
        here = {row.op: row for row in found if row.dtype == dtype}
        for provider in providers:
            points = [(x, y) for y, op in enumerate(ops) if op in here and (x := value(here[op], provider)) is not None]
            if points:
                hollow: dict[str, Any] = {} if provider == PACK else dict(markerfacecolor="none", markersize=10)
                style = (
                    dict(color=COLORS[provider], marker=MARKERS[provider], markersize=7, markeredgewidth=1.8) | hollow
                )
                axes.plot(*zip(*points), linestyle="none", label=provider, **style)
        draw(axes, values)
        axes.set_title(dtype, fontsize=FONT, loc="left")
        axes.set_yticks(range(len(ops)), [op.removeprefix("threshold_loss.").replace(".", " × ") for op in ops])
        axes.set_ylim(len(ops) - 0.5, -0.5)
        clean(axes)
    marks = {name: mark for axes in panels for mark, name in zip(*axes.get_legend_handles_labels())}
    figure.legend(list(marks.values()), list(marks), loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(textwrap.fill(title, 60) + "\n" + textwrap.fill(note, 75), fontsize=FONT - 1)
    return figure
