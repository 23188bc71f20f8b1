"""One PNG: for each task its loss curves, and beside them what it learned."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import precision_recall_curve, roc_curve

from .data import Array
from .tasks import PROGRESSION, Version
from .train import WATCH_EVERY, Result

BLUE, ORANGE, GREY = "#0b5fa5", "#f28e2b", "#6b6b6b"
LAYERS = "#2a9d8f", "#8e5ea2", "#b5651d"
COLUMNS = 2
ROW = 5  # digits in a row of the denoiser's panel


def draw(results: dict[str, Result], path: Path) -> None:
    rows = -(-len(results) // COLUMNS)
    figure = Figure(figsize=(10 * COLUMNS, 5 * rows), layout="constrained")
    parts = figure.subfigures(rows, COLUMNS, squeeze=False, wspace=0.03, hspace=0.03)
    for part, (name, result) in zip(parts.flat, results.items()):
        axes = part.subplot_mosaic([["both", "panel"], ["plain", "panel"]], height_ratios=(2, 1), width_ratios=(6, 5))
        part.suptitle(f"{result.task.title} ({result.task.op})", fontweight="bold")
        draw_curves(axes["both"], axes["plain"], result)
        PANELS[name](axes["panel"], result)
    figure.savefig(path, dpi=100)


def draw_curves(both: Axes, plain: Axes, result: Result) -> None:
    task, trained = result.task, result.trained
    both.plot(trained["pack"].curve, color=BLUE, linewidth=2.2, label="pack")
    both.plot(trained["formula"].curve, color=ORANGE, linewidth=1.2, linestyle=(0, (3, 3)), label="formula")
    both.text(0.97, 0.62, f"differ by at most {result.differences.max():.1g}", transform=both.transAxes, ha="right")
    both.legend(loc="upper right")
    plain.plot(trained["plain"].curve, color=GREY, linewidth=1.2, label=f"plain: {task.plain}")
    plain.legend(loc="upper right")
    plain.set_xlabel("step")
    for axis in (both, plain):
        axis.set_ylabel("loss")
        axis.set_ylim(bottom=0)
        axis.margins(x=0)


def compared(result: Result) -> list[tuple[Array, str, str]]:
    """Prediction, colour and label of the plain run, then of the pack's."""
    versions: tuple[tuple[Version, str], ...] = (("plain", GREY), ("pack", BLUE))
    return [
        (
            result.trained[version].prediction,
            color,
            f"{version}: {result.task.metric} {result.trained[version].metric:.3f}",
        )
        for version, color in versions
    ]


def draw_precision_recall(panel: Axes, result: Result) -> None:
    for prediction, color, label in compared(result):
        precision, recall, _ = precision_recall_curve(result.data.test_truth, prediction)
        panel.step(recall, precision, where="post", color=color, label=label)
    panel.set(xlabel="recall", ylabel="precision", title="held-out rows", xlim=(0, 1), ylim=(0, 1.02))
    panel.legend(loc="lower left")


def draw_predictions(panel: Axes, result: Result) -> None:
    truth, line, reach = result.data.test_truth, PROGRESSION["threshold"], PROGRESSION["penalty_range"]
    panel.axvspan(line - reach, line + reach, color=ORANGE, alpha=0.2, linewidth=0, label="penalised")
    panel.axvline(line, color=ORANGE, linewidth=1)
    for (prediction, color, label), size in zip(compared(result), (40, 14), strict=True):
        panel.scatter(
            prediction, truth, s=size, edgecolors=color, facecolors="none" if size > 14 else color, label=label
        )
    panel.axline((0, 0), slope=1, color="black", linewidth=0.6)
    panel.set(xlabel="predicted", ylabel="true", title="held-out rows, in standard deviations")
    panel.set_ylim(top=truth.max() + 1.2)
    panel.legend(loc="upper left")


def draw_roc(panel: Axes, result: Result) -> None:
    for prediction, color, label in compared(result):
        false_alarms, found, _ = roc_curve(result.data.test_truth, prediction)
        panel.plot(false_alarms, found, color=color, label=label)
    panel.axline((0, 0), slope=1, color="black", linewidth=0.6)
    panel.set(xlabel="benign rows raising an alarm", ylabel="malignant rows found", title="held-out rows", xlim=(0, 1))
    panel.set_ylim(0, 1.02)
    panel.legend(loc="lower right")


def draw_digits(panel: Axes, result: Result) -> None:
    def row(pixels: Array) -> Array:
        return np.hstack([np.pad(image, 1, constant_values=0.35) for image in pixels[:ROW].reshape(-1, 8, 8)])

    trained = result.trained
    rows = {
        "clean": result.data.test_truth,
        "noisy": result.data.test_input.numpy(),
        f"plain\n{trained['plain'].metric:.2f} dB": trained["plain"].prediction,
        f"pack\n{trained['pack'].metric:.2f} dB": trained["pack"].prediction,
    }
    panel.imshow(np.vstack([row(pixels) for pixels in rows.values()]), cmap="gray_r", vmin=0, vmax=1)
    panel.set_yticks(4.5 + 10 * np.arange(len(rows)), list(rows))
    panel.set_xticks([])
    panel.tick_params(length=0)
    panel.set_title(f"zeros in the code: pack {trained['pack'].secondary:.0%}, plain {trained['plain'].secondary:.0%}")


def draw_paths(panel: Axes, result: Result) -> None:
    ends: tuple[tuple[Version, str, str], ...] = (("plain", GREY, "o"), ("pack", BLUE, "o"), ("formula", ORANGE, "x"))
    for version, color, end in ends:
        run = result.trained[version]
        if version != "formula":
            panel.plot(run.watched["L0"], run.watched["R²"], ".-", color=color, linewidth=1)
        label = f"{version}: R² {run.metric:.3f}, L0 {run.secondary:.1f}"
        panel.plot(run.secondary, run.metric, end, markersize=9, linestyle="", color=color, label=label)
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter("{x:.0f}")
    panel.set(
        xlabel="features of a row (L0)", ylabel="R²", title=f"held-out rows, every {WATCH_EVERY} steps up to the mark"
    )
    bottom, top = panel.get_ylim()
    panel.set_ylim(bottom - 0.4 * (top - bottom), top)  # for the legend
    panel.legend(loc="lower left")


def draw_kept(panel: Axes, result: Result) -> None:
    lines: tuple[tuple[Version, str], ...] = (("plain", ":"), ("pack", "-"))
    for version, line in lines:
        watched = result.trained[version].watched
        for (layer, kept), color in zip(watched.items(), LAYERS):
            steps = WATCH_EVERY * np.arange(len(kept))
            panel.plot(steps, kept, color=color, linestyle=line, label=f"{version}, {layer}")
    (_, _, plain), (_, _, pack) = compared(result)
    panel.set(xlabel="step", ylabel="gradient entries that are not 0", title=f"{pack}, {plain}", ylim=(0, 1.35))
    panel.set_yticks(np.linspace(0, 1, 6))
    panel.margins(x=0)
    panel.legend(loc="upper center", ncols=2)


PANELS = {
    "classifier": draw_precision_recall,
    "regressor": draw_predictions,
    "detector": draw_roc,
    "denoiser": draw_digits,
    "autoencoder": draw_paths,
    "gradients": draw_kept,
}
