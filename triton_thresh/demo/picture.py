"""One PNG: a column per task with its loss curves above and what it learned below."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import precision_recall_curve, roc_curve

from .data import Array
from .tasks import PROGRESSION, Version
from .train import Result

BLUE, ORANGE, GREY = "#0b5fa5", "#f28e2b", "#6b6b6b"
ROW = 5  # digits in a row of the denoiser's panel


def draw(results: dict[str, Result], path: Path) -> None:
    figure = Figure(figsize=(19, 11), layout="constrained")
    axes = figure.subplots(3, len(results), height_ratios=(3, 1.5, 4), squeeze=False)
    for column, (name, result) in enumerate(results.items()):
        both, plain, panel = axes[:, column]
        draw_curves(both, plain, result)
        PANELS[name](panel, result)
    figure.savefig(path, dpi=110)


def draw_curves(both: Axes, plain: Axes, result: Result) -> None:
    task, trained = result.task, result.trained
    both.plot(trained["pack"].curve, color=BLUE, linewidth=2.2, label="pack")
    both.plot(trained["formula"].curve, color=ORANGE, linewidth=1.2, linestyle=(0, (3, 3)), label="formula")
    both.set_title(f"{task.title}\n{task.op}", fontweight="bold")
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
    panel.set_title(f"zeros in the code: pack {trained['pack'].share:.0%}, plain {trained['plain'].share:.0%}")


PANELS = {
    "classifier": draw_precision_recall,
    "regressor": draw_predictions,
    "detector": draw_roc,
    "denoiser": draw_digits,
}
