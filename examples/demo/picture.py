"""One PNG: for each task what its op did, and beside it every fold's scores without the op and with it."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import precision_recall_curve, roc_curve

from .compare import Result
from .data import Array, photographs
from .tasks import ALL_LAYERS, LIMIT, Measure
from .train import WATCH_EVERY

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#777777"
LAYERS = "#009E73", "#CC79A7", "#E69F00"
COLUMNS = 2
CROP = slice(150, 240), slice(250, 430)  # of the first photograph


def draw(results: Mapping[str, Result], path: Path) -> None:
    rows = -(-len(results) // COLUMNS)
    figure = Figure(figsize=(8.5 * COLUMNS, 3.7 * rows + 0.8), layout="constrained")
    same = sum(result.agrees for result in results.values())
    figure.suptitle(
        "What each op does for its task, on rows held out (blue: with the op; grey: the baseline)\n"
        f"Each op is also the formula written by hand: same loss curve in {same} of {len(results)}",
        fontsize=14,
    )
    parts = figure.subfigures(rows, COLUMNS, squeeze=False, wspace=0.03, hspace=0.05)
    for part, (name, result) in zip(parts.flat, results.items()):
        part.suptitle(f"{result.task.op} against {result.task.baseline_name}\n{result.task.title}", fontsize=11)
        measures = result.task.measures
        panel, *strips = part.subplots(1, 1 + len(measures), width_ratios=(3.2, *(1 for _ in measures)))
        PANELS[name](panel, result)
        panel.spines[["top", "right"]].set_visible(False)
        for strip, measure in zip(strips, measures):
            draw_folds(strip, result, measure)
    figure.savefig(path, dpi=110)


def draw_folds(strip: Axes, result: Result, measure: Measure) -> None:
    """A line for each fold, from the baseline to the op, and their mean."""
    without, with_op = (measure.of(run) for run in (result.baseline, result.pack))
    strip.plot([0, 1], [without, with_op], color=GREY, linewidth=0.8, alpha=0.5)
    strip.plot([0, 1], [without.mean(), with_op.mean()], color="black", linewidth=2)
    strip.plot(0, without.mean(), "o", color=GREY, markersize=8)
    strip.plot(1, with_op.mean(), "o", color=BLUE, markersize=8)
    difference = result.difference(measure)
    strip.set_title(f"{measure.name}\n{difference.verdict(measure)}", fontsize=9)
    strip.set_xticks([0, 1], [measure.format.format(values.mean()) for values in (without, with_op)])
    strip.set_xlim(-0.35, 1.35)
    strip.tick_params(axis="y", labelsize=8)
    strip.spines[["top", "right"]].set_visible(False)


def compared(result: Result) -> list[tuple[Array, str, str]]:
    """Prediction, colour and name of the baseline, then of the op."""
    return [
        (result.baseline.prediction, GREY, result.task.baseline_name),
        (result.pack.prediction, BLUE, result.task.op),
    ]


def draw_precision_recall(panel: Axes, result: Result) -> None:
    eight = result.pack.data.test_truth.ravel()
    for logits, color, name in compared(result):
        precision, recall, at = precision_recall_curve(eight, logits.ravel())
        panel.step(recall, precision, where="post", color=color, label=name)
        half = np.searchsorted(at, 0.0)
        panel.plot(recall[half], precision[half], "o", color=color, markersize=9)
    panel.plot([], [], "o", color="black", label="p = 0.5")
    panel.set(xlabel="recall", ylabel="precision", xlim=(0.5, 1.01), ylim=(0.5, 1.02))
    panel.legend(loc="lower left", frameon=False)


def draw_distances(panel: Axes, result: Result) -> None:
    at, reach = np.linspace(0, 1.5, 151), LIMIT["penalty_range"]
    panel.axvspan(0, reach, color=ORANGE, alpha=0.15, linewidth=0, label="near the limit")
    for prediction, color, name in compared(result):
        distances = np.sort(np.abs(prediction - LIMIT["threshold"]).ravel())
        panel.plot(at, 100 * np.searchsorted(distances, at) / len(distances), color=color, linewidth=2, label=name)
    panel.set(xlabel="distance from the limit, in standard deviations", ylabel="predictions that are nearer, %")
    panel.set(xlim=(0, 1.5), ylim=(0, 101))
    panel.legend(loc="lower right", frameon=False)


def mean_roc(errors: Array, malignant: Array, at: Array) -> Array:
    """The share that is found, for each share of false alarms; mean of the folds, whose scores have different scales."""
    curves = [roc_curve(truth, fold.mean(1)) for fold, truth in zip(errors, malignant)]
    mean: Array = np.mean([np.interp(at, alarms, found) for alarms, found, _ in curves], axis=0)
    return mean


def draw_roc(panel: Axes, result: Result) -> None:
    at = np.linspace(0, 0.4, 81)
    for errors, color, name in compared(result):
        panel.plot(
            100 * at, 100 * mean_roc(errors, result.pack.data.test_truth, at), color=color, linewidth=2, label=name
        )
    panel.set(
        xlabel="benign rows that raise an alarm, %", ylabel="malignant rows found, %", xlim=(0, 40), ylim=(50, 101)
    )
    panel.legend(loc="lower right", frameon=False)


def draw_photographs(panel: Axes, result: Result) -> None:
    data = result.pack.data

    def crop(patches: Array) -> Array:
        """Every patch was held out once, so that the whole photograph comes of patches that no model had seen."""
        whole: Array = np.empty((patches.shape[0] * patches.shape[1], patches.shape[2]))
        whole[data.test_rows.ravel()] = patches.reshape(whole.shape)
        image: Array = photographs(whole)[0][CROP]
        return image

    images = {
        "clean": data.test_truth,
        "with noise": data.test_input.numpy(),
        result.task.baseline_name: result.baseline.prediction,
        result.task.op: result.pack.prediction,
    }
    shown = [np.pad(crop(patches), ((14, 2), (0, 4)), constant_values=1) for patches in images.values()]
    height, width = shown[0].shape
    panel.imshow(np.block([shown[:2], shown[2:]]), cmap="gray", vmin=0, vmax=1)
    for nth, name in enumerate(images):
        panel.text((nth % 2 + 0.5) * width, nth // 2 * height + 10, name, ha="center", fontsize=10)
    panel.set_axis_off()


def draw_paths(panel: Axes, result: Result) -> None:
    for run, color, name in (
        (result.baseline, GREY, result.task.baseline_name),
        (result.pack, BLUE, result.task.op),
    ):
        l0, r2 = (run.watched[label].mean(1) for label in ("L0", "R²"))
        panel.plot(l0, r2, ".-", color=color, linewidth=1, markersize=3)
        panel.plot(l0[-1], r2[-1], "o", color=color, markersize=9, label=name)
    panel.set(xlabel=f"features of a row, every {WATCH_EVERY} steps up to the mark", ylabel="R²", ylim=(0.4, 1))
    panel.legend(loc="lower left", frameon=False)


def draw_kept(panel: Axes, result: Result) -> None:
    for run, line, name in ((result.baseline, ":", result.task.baseline_name), (result.pack, "-", result.task.op)):
        layers = [label for label in run.watched if label != ALL_LAYERS]
        for label, color in zip(layers, LAYERS):
            kept = 100 * run.watched[label].mean(1)
            steps = np.minimum(WATCH_EVERY * np.arange(len(kept)), len(run.losses) - 1)
            panel.plot(steps, kept, color=color, linestyle=line, label=f"{label}, {name}")
    panel.set(xlabel="step", ylabel="gradient entries that are not 0, %", ylim=(0, 145))
    panel.set_yticks(range(0, 101, 20))
    panel.legend(loc="upper center", ncols=2, frameon=False, fontsize=9)


PANELS = {
    "classifier": draw_precision_recall,
    "regressor": draw_distances,
    "detector": draw_roc,
    "denoiser": draw_photographs,
    "autoencoder": draw_paths,
    "gradients": draw_kept,
}
