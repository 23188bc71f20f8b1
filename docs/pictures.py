"""Draws the front page's picture from committed results: ``python -m docs.pictures`` writes docs/picture.png."""

from __future__ import annotations

import hashlib
import statistics
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from docs.tables import RESULTS, counted, loaded

PICTURE = Path(__file__).parent / "picture.png"
SOURCES = ("bytes.json", "features.json")
SHOWN = ("hardshrink", "jumprelu_l0", "threshold_bce_with_logits_loss", "sigmoid_focal_loss")
COLORS = {"eager": "#9aa5b1", "compiled": "#e69f00", "this": "#0072b2"}
LABELS = {"eager": "eager PyTorch", "compiled": "the same under torch.compile", "this": "triton_thresh"}


def digest() -> str:
    """A hash of the results that the picture shows. It is kept in the picture, so that a test sees when they differ."""
    return hashlib.sha256(b"".join((RESULTS / name).read_bytes() for name in SOURCES)).hexdigest()


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


def main() -> None:
    figure = Figure(figsize=(11, 3.8), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.35, 1))
    bytes_panel(left)
    features_panel(right)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontweight("bold")
    figure.savefig(PICTURE, metadata={"Source": digest()})


if __name__ == "__main__":
    main()
