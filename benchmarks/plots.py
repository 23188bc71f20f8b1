"""Pictures of records: bandwidth against size, speed-up, peak memory."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from PIL import Image

from benchmarks.records import Record
from benchmarks.run import COMPILE, COPY, EAGER, PACK
from benchmarks.tables import Row, rows

# Okabe and Ito's colours, told apart with every kind of colour vision; each provider has a marker of its own too.
COLORS = {EAGER: "#0072B2", COMPILE: "#009E73", PACK: "#D55E00", COPY: "#555555"}
MARKERS = {EAGER: "s", COMPILE: "^", PACK: "o"}
COLUMNS = 4
LIGHT = "#dddddd"

mpl.rcParams["svg.fonttype"] = "none"  # text stays text
mpl.rcParams["svg.hashsalt"] = "triton_thresh"


def save(figure: Figure, path: Path) -> list[Path]:
    """As PNG and SVG beside each other, the same bytes for the same records."""
    made = [path.parent / f"{path.name}.{kind}" for kind in ("png", "svg")]
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100, format="png")
    picture = Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    picture.save(made[0], optimize=True)  # a third of the bytes
    figure.savefig(made[1], metadata={"Date": None})
    return made


def clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=LIGHT, linewidth=0.6)
    axes.set_axisbelow(True)


def bandwidth(records: Sequence[Record], mode: str, dtype: str, title: str) -> Figure | None:
    """A panel for each op: GB/s against the number of elements, with the copy of the same run as the ceiling."""
    kept = [r for r in records if r.dtype == dtype and r.gbps]
    ops = list(dict.fromkeys(r.op for r in kept if r.mode == mode and r.op != COPY))
    if not ops:
        return None
    copies = sorted((r.numel, r.gbps or 0) for r in kept if r.op == COPY)
    # a linear scale shows what is missing to the ceiling; where most ops stay far below it, nothing
    best = [max(r.copy_fraction or 1 for r in kept if r.op == op and r.mode == mode) for op in ops]
    far = statistics.median(best) < 0.3
    columns = min(COLUMNS, len(ops))
    height = math.ceil(len(ops) / columns)
    figure = Figure(figsize=(3.4 * columns + 0.4, 2.5 * height + 1.2), layout="constrained")
    panels = figure.subplots(height, columns, sharex=True, sharey=True, squeeze=False)
    for axes in panels.flat[len(ops) :]:
        axes.set_axis_off()
    for place, (op, axes) in enumerate(zip(ops, panels.flat)):
        if copies:
            axes.plot(*zip(*copies), color=COLORS[COPY], linestyle="--", linewidth=1.3, label="copy (the ceiling)")
        for provider in (EAGER, COMPILE, PACK):
            line = sorted(
                (r.numel, r.gbps or 0, _gbps(r, r.ms_p80), _gbps(r, r.ms_p20))
                for r in kept
                if (r.op, r.mode, r.provider) == (op, mode, provider)
            )
            if line:
                n, middle, low, high = zip(*line)
                color = COLORS[provider]
                axes.plot(n, middle, color=color, marker=MARKERS[provider], markersize=5, linewidth=1.6, label=provider)
                axes.fill_between(n, low, high, color=color, alpha=0.18, linewidth=0)
        axes.set_title(op.replace("threshold_loss.", "threshold_loss\n"), fontsize=9)
        axes.set_xscale("log", base=2)
        if far:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        clean(axes)
        if place + columns >= len(ops):
            axes.set_xlabel("elements")
            axes.tick_params(labelbottom=True)
        if place % columns == 0:
            axes.set_ylabel("GB/s")
    _legend(figure, panels.flat[: len(ops)])
    figure.suptitle(f"{dtype}, {_words(mode)}: bytes the op must move over the time it takes\n{title}", fontsize=10)
    return figure


def speedup(records: Sequence[Record], mode: str, title: str) -> Figure | None:
    """At the largest size: how many times as long each baseline takes as the pack."""
    found = _largest(rows(records), mode)
    baselines = [b for b in (EAGER, COMPILE) if any(row.speedup(b) for row in found)]
    if not baselines:
        return None

    def draw(axes: Axes, ops: Sequence[str], here: dict[str, Row]) -> None:
        axes.axvline(1, color="black", linewidth=1)
        for baseline in baselines:
            points = [(x, y) for y, op in enumerate(ops) if op in here and (x := here[op].speedup(baseline))]
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                linestyle="none",
                marker=MARKERS[baseline],
                markersize=8,
                color=COLORS[baseline],
                label=f"{baseline} / triton_thresh",
            )
        axes.set_xscale("log", base=2)
        values = [x for row in found for b in baselines if (x := row.speedup(b))]
        low, high = min([0.5, *values]), max([2.0, *values])
        axes.set_xlim(low / 1.25, high * 1.25)
        exponents = range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)
        axes.set_xticks(ticks := [2.0**e for e in exponents if e % -(-len(exponents) // 6) == 0])
        axes.set_xticklabels([f"{t:g}×" if t >= 1 else f"1/{1 / t:g}×" for t in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("baseline's time / pack's time")

    return _by_op(found, f"{_words(mode)}: time against the baselines (right of 1: the pack is faster)\n{title}", draw)


def memory(records: Sequence[Record], mode: str, title: str) -> Figure | None:
    """At the largest size: peak memory beyond the inputs, in bytes an element."""
    found = [row for row in _largest(rows(records), mode) if any(r.peak_bytes is not None for r in row.by.values())]
    providers = [p for p in (EAGER, COMPILE, PACK) if any(p in row.by for row in found)]
    if not providers:
        return None

    def draw(axes: Axes, ops: Sequence[str], here: dict[str, Row]) -> None:
        thick = 0.8 / len(providers)
        for nth, provider in enumerate(providers):
            bars = [
                (place + (nth - (len(providers) - 1) / 2) * thick, (r.peak_bytes or 0) / r.numel)
                for place, op in enumerate(ops)
                if op in here and (r := here[op].by.get(provider)) and r.peak_bytes is not None
            ]
            if bars:
                places, widths = zip(*bars)
                axes.barh(places, widths, height=thick * 0.9, color=COLORS[provider], label=provider)
        axes.set_xlabel("bytes an element, beyond the inputs")

    return _by_op(found, f"{_words(mode)}: peak memory\n{title}", draw)


def _by_op(
    found: Sequence[Row], title: str, draw: Callable[[Axes, Sequence[str], dict[str, Row]], None]
) -> Figure | None:
    """A panel for each dtype, a line for each op."""
    if not found:
        return None
    ops = list(dict.fromkeys(row.op for row in found))
    dtypes = list(dict.fromkeys(row.dtype for row in found))
    figure = Figure(figsize=(3.2 + 4.2 * len(dtypes), 0.34 * len(ops) + 2.0), layout="constrained")
    panels = figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0]
    for axes, dtype in zip(panels, dtypes):
        here = {row.op: row for row in found if row.dtype == dtype}
        draw(axes, ops, here)
        axes.set_title(dtype, fontsize=10)
        axes.set_yticks(range(len(ops)), ops, fontsize=9)
        axes.set_ylim(len(ops) - 0.5, -0.5)
        clean(axes)
    _legend(figure, panels)
    figure.suptitle(title, fontsize=10)
    return figure


def _legend(figure: Figure, panels: Iterable[Axes]) -> None:
    entries: dict[str, Artist] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            entries.setdefault(label, handle)
    figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=len(entries), frameon=False)


def _largest(found: Sequence[Row], mode: str) -> list[Row]:
    most = max((row.numel for row in found if row.mode == mode), default=0)
    return [row for row in found if row.mode == mode and row.numel == most]


def _gbps(record: Record, ms: float | None) -> float:
    return record.bytes / ms / 1e6 if ms else 0.0


def _words(mode: str) -> str:
    return {"forward": "forward", "backward": "backward alone", "both": "forward and backward"}[mode]
