"""Draws pictures from committed results: ``python -m docs.pictures`` writes the front page's and that of many labels."""

from __future__ import annotations

import hashlib
import json
import statistics
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.linear import COMPILED, PACK, WRITTEN, LinearRecord
from docs.tables import RESULTS, counted, loaded

PICTURE, MANY_LABELS = (Path(__file__).parent / name for name in ("picture.png", "many-labels.png"))
SOURCES = {
    PICTURE: (RESULTS / "bytes.json", RESULTS / "features.json"),
    MANY_LABELS: tuple(sorted(RESULTS.glob("linear/cpu-*/labels.jsonl"))[-1:]),
}
SHOWN = ("hardshrink", "jumprelu_l0", "threshold_bce_with_logits_loss", "sigmoid_focal_loss")
COLORS = {"eager": "#9aa5b1", "compiled": "#e69f00", "this": "#0072b2"}
LABELS = {"eager": "eager PyTorch", "compiled": "the same under torch.compile", "this": "triton_thresh"}


def digest(picture: Path) -> str:
    """A hash of the results that a picture shows. It is kept in the picture, so that a test sees when they differ."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES[picture])).hexdigest()


def bytes_panel(axes: Axes) -> None:
    lines = {line["op"]: line for line in counted() if line["dtype"] == "float32"}
    for place, op in enumerate(SHOWN):
        for nth, (kind, color) in enumerate(COLORS.items()):
            value = lines[op][kind]
            at = place + 0.27 * (nth - 1)
            axes.barh(at, value, height=0.25, color=color, label=LABELS[kind] if place == 0 else None)
            times = "" if kind == "this" else f" ({value / lines[op]['this']:.1f}×)"
            axes.text(value, at, f" {value:.3g}{times}", va="center", fontsize=8)
    axes.set_yticks(range(len(SHOWN)), [op.replace("_with", "\n_with") for op in SHOWN])
    axes.invert_yaxis()
    axes.set(title="Bytes of a training step, counted", xlabel="bytes per element, forward and backward, float32")
    axes.set_xlim(0, 1.22 * max(lines[op]["eager"] for op in SHOWN))
    axes.legend(frameon=False, loc="upper right")


def features_panel(axes: Axes) -> None:
    found: dict[str, Any] = loaded("features.json")
    for name, color, marker in (("JumpReLU + L0", COLORS["this"], "o"), ("ReLU + L1", COLORS["eager"], "s")):
        x = [statistics.mean(line["features"]) for line in found[name]]
        y = [statistics.mean(line["r2"]) for line in found[name]]
        spread = [statistics.stdev(line["r2"]) for line in found[name]]
        axes.fill_between(
            x, [a - b for a, b in zip(y, spread)], [a + b for a, b in zip(y, spread)], color=color, alpha=0.3
        )
        axes.plot(x, y, color=color, marker=marker, label=name)
    axes.set_xscale("log")
    axes.set_xticks(ticks := (6, 10, 20, 40, 60), map(str, ticks))
    axes.minorticks_off()
    axes.set(title="Sparse autoencoder on digits", xlabel="features of a row", ylabel="R², held-out rows")
    axes.legend(frameon=False, loc="lower right")


def labels_panel(axes: Axes) -> None:
    """Extra memory of a step against the number of labels."""
    (source,) = SOURCES[MANY_LABELS]
    found = [LinearRecord(**json.loads(line)) for line in source.read_text().splitlines()]
    shown = {WRITTEN: ("eager", "o"), COMPILED: ("compiled", "s"), PACK: ("this", "D")}
    for provider, (kind, marker) in shown.items():
        own = [record for record in found if record.provider == provider]
        x, y = [record.labels for record in own], [record.extra_bytes / 2**20 for record in own]
        axes.plot(x, y, color=COLORS[kind], marker=marker, label=LABELS[kind])
        axes.annotate(f"{y[-1]:,.0f} MiB", (x[-1], y[-1]), (7, 0), textcoords="offset points", va="center", fontsize=8)
    rows, features = found[0].rows, found[0].features
    axes.set(xscale="log", yscale="log", xlabel="labels", ylabel="MiB beyond inputs and gradients")
    axes.set(title=f"Memory of a training step, {rows} rows of {features} features, float32")
    axes.set_xlim(right=4 * max(record.labels for record in found))
    axes.legend(frameon=False, loc="upper left")


def save(figure: Figure, path: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontweight("bold")
    figure.savefig(path, metadata={"Source": digest(path)})


def main() -> None:
    figure = Figure(figsize=(11, 3.8), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.35, 1))
    bytes_panel(left)
    features_panel(right)
    save(figure, PICTURE)
    figure = Figure(figsize=(7, 3.8), dpi=150, layout="constrained")
    labels_panel(figure.subplots())
    save(figure, MANY_LABELS)


if __name__ == "__main__":
    main()
