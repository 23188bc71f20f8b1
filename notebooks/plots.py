"""The figures of the notebooks. A notebook computes; what it computed is drawn here.

Importing this module also lets a notebook import `examples` and `benchmarks` from the clone that it lies in.
"""

import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from IPython.display import Image
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image as Pillow

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

DPI = 150
SHOWN = 90  # pixels an inch on the page
# Okabe and Ito's colours, told apart with every kind of colour vision
BLUE, ORANGE, GREEN, PINK, GREY, YELLOW = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#777777", "#E69F00"
mpl.rcParams.update(
    {
        "font.size": 10,
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": mpl.cycler(color=(BLUE, ORANGE, GREEN, PINK, YELLOW, GREY)),
        "legend.frameon": False,
        "legend.fontsize": 9,
        "image.interpolation": "nearest",
    }
)


def panels(rows: int, columns: int, size: tuple[float, float], **settings) -> np.ndarray:
    """Axes of a new figure, [rows, columns]; `size` in inches."""
    return Figure(figsize=size, layout="constrained").subplots(rows, columns, squeeze=False, **settings)


def show(what: Figure | np.ndarray) -> Image:
    """A figure, or that of these axes, in 256 colours: a third of the bytes, and no difference to see."""
    figure, drawn = what if isinstance(what, Figure) else what.flat[0].figure, io.BytesIO()
    figure.savefig(drawn, dpi=DPI, format="png")
    picture = Pillow.open(drawn).convert("RGB").quantize(256, Pillow.Quantize.MEDIANCUT, dither=Pillow.Dither.NONE)
    stored = io.BytesIO()
    picture.save(stored, format="png", optimize=True, dpi=(DPI, DPI))
    return Image(stored.getvalue(), width=round(SHOWN * figure.get_figwidth()))


def array(values) -> np.ndarray:
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def curve(axes: Axes, x, y, **style) -> None:
    """A line with a gap wherever the values jump."""
    y = array(y).astype(float)
    y[1:][np.abs(np.diff(y)) > 0.2] = np.nan
    axes.plot(array(x), y, **style)


def pictures(images: Mapping[str, object], width: float = 9.0, columns: int = 4, **settings) -> Image:
    """Images with their labels: [height, width], or [3, height, width] in colour."""
    rows = -(-len(images) // columns)
    first = array(next(iter(images.values())))
    height = width / columns * first.shape[-2] / first.shape[-1] + 0.35
    axes = panels(rows, columns, (width, rows * height))
    for panel, (label, image) in zip(axes.flat, images.items()):
        values = array(image)
        panel.imshow(values.transpose(1, 2, 0) if values.ndim == 3 else values, **settings)
        panel.set_title(label, fontsize=9)
    for panel in axes.flat:
        panel.axis("off")
    return show(axes)


def lines(series: Mapping[str, tuple], size: tuple[float, float] = (6.5, 3.0), log2: bool = False, **labels) -> Image:
    """A line for each (x, y)."""
    axes = panels(1, 1, size)
    panel = axes[0, 0]
    for (label, (x, y)), marker in zip(series.items(), "os^Dv"):
        panel.plot(array(x), array(y), marker=marker, markersize=4, markevery=max(1, len(array(x)) // 10), label=label)
    if log2:
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:g}")
    panel.set(**labels)
    panel.grid(alpha=0.25)
    panel.legend()
    return show(axes)


# ------------------------------------------------------------------------------------------------------ 00 and 01: gates
PARTS = {
    "y": dict(color=BLUE, linewidth=2.5, label="$y$"),
    "∂y/∂x": dict(color=ORANGE, linewidth=1.8, linestyle="--", label=r"$\partial y/\partial x$"),
    "∂y/∂threshold": dict(color=GREEN, linewidth=2, linestyle=":", label=r"$\partial y/\partial$ threshold"),
    "gradient passed on": dict(color=PINK, linewidth=2.5, label="gradient passed on"),
}


def gates(x, curves: Mapping[str, Mapping[str, object]], dots: Mapping[str, tuple], columns: int = 4) -> Image:
    """For each gate its curves (keys of PARTS), and dots at the thresholds."""
    rows = -(-(len(curves) + 1) // columns)
    axes = panels(rows, columns, (2.75 * columns, 2.7 * rows))
    for panel, (name, parts) in zip(axes.flat, curves.items()):
        for part, values in parts.items():
            if values is not None:
                curve(panel, x, values, **PARTS[part])
        at, y = map(array, dots[name])
        panel.plot(at, y, "o", color=PARTS[next(iter(parts))]["color"], markersize=6)
        panel.axhline(0, color="black", linewidth=0.5)
        panel.set_title(name, fontweight="bold")
        panel.set_xlabel("upstream gradient" if "gradient passed on" in parts else "$x$")
        panel.set_ylim(-4.4 if name == "step" else -2.1, 1.7)
        panel.grid(alpha=0.25)
    handles = {
        h.get_label(): h for panel in axes.flat[: len(curves)] for h in panel.get_lines() if h.get_label()[0] != "_"
    }
    for panel in axes.flat[len(curves) :]:
        panel.axis("off")
    axes.flat[len(curves)].legend(handles.values(), handles.keys(), loc="center", fontsize=11)
    return show(axes)


def rounding(found: Mapping[str, tuple]) -> Image:
    """For each dtype (values, what 0.1 is rounded to, {rule: mask of what it keeps})."""
    axes = panels(len(found), 1, (9, 1.85 * len(found)), sharex=True)
    for panel, (dtype, (values, rounded, rules)) in zip(axes.flat, found.items()):
        values = array(values.float())
        for row, kept in enumerate(map(array, rules.values())):
            for mask, color, marker, label in ((kept, BLUE, "o", "kept"), (~kept, ORANGE, "x", "dropped")):
                where = np.full(mask.sum(), row)
                panel.scatter(values[mask], where, c=color, marker=marker, s=45, label=label if row == 0 else None)
        panel.axvline(0.1, color="black", linewidth=1, label="0.1")
        panel.axvline(rounded, color=GREY, linewidth=1, linestyle="--", label="0.1 rounded")
        panel.set_yticks(range(len(rules)), rules)
        panel.set_ylim(-0.6, len(rules) - 0.4)
        panel.set_title(f"{dtype}: 0.1 is rounded to {rounded:.11g}", loc="left")
    figure = axes.flat[0].figure
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=4, loc="outside upper right")
    axes.flat[-1].set_xlabel("$x$")
    return show(axes)


def channels(images: Mapping[str, object], shares: Mapping[str, object]) -> Image:
    """Images in colour, and the share that each keeps of its channels."""
    axes = panels(1, len(images) + 1, (9, 2.2), width_ratios=(*(3 for _ in images), 2))
    for panel, (label, image) in zip(axes.flat, images.items()):
        panel.imshow(array(image).transpose(1, 2, 0))
        panel.set_title(label)
        panel.axis("off")
    for offset, (label, share), color in zip((-0.2, 0.2), shares.items(), (GREY, BLUE)):
        axes.flat[-1].bar(np.arange(3) + offset, 100 * array(share), 0.4, color=color, label=label)
    axes.flat[-1].set_xticks(range(3), ["red", "green", "blue"])
    axes.flat[-1].set(ylabel="kept, %", ylim=(0, 33))
    axes.flat[-1].legend(fontsize=8)
    return show(axes)


def denoising(
    details: Mapping[str, object], ratios, errors: Mapping[str, object], sigma: float, universal: float
) -> Image:
    """Histograms of wavelet coefficients, and the error over the threshold for each gate."""
    axes = panels(1, 2, (11, 3.6))
    left, right = axes.flat
    for (label, values), color in zip(details.items(), (GREY, BLUE)):
        left.hist(
            array(values).ravel(), np.linspace(-0.8, 0.8, 81), histtype="step", color=color, linewidth=1.8, label=label
        )
    left.set(yscale="log", xlabel="coefficient", ylabel="count", title="details of the finest level")
    left.legend()
    for (name, curve), color, style in zip(errors.items(), (ORANGE, BLUE), ("--", "-")):
        best = curve.argmin()
        right.plot(ratios, curve, color=color, linestyle=style, linewidth=2)
        right.plot(ratios[best], curve[best], "o", color=color)
        label = f"{name}\n{curve[best]:.4f} at {ratios[best]:.1f} σ"
        right.text(ratios[best], curve[best] - 0.003, label, color=color, ha="center", va="top")
    right.axhline(sigma, color=GREY, linewidth=1, linestyle=":")
    right.text(4.9, sigma + 0.001, "the noise itself", color=GREY, ha="right")
    right.axvline(universal, color=GREY, linewidth=1, linestyle=":")
    right.text(universal - 0.06, 0.052, "universal\nthreshold", color=GREY, ha="right")
    right.set(xlabel="threshold / σ", ylabel="RMSE against the clean image", title="what is left after thresholding")
    right.set_ylim(0.05, 0.105)
    return show(axes)


# ----------------------------------------------------------------------------------------------------------- 02: losses
BASES = {"bce": "probability $p$", "bce_with_logits": "logit $x$", "mse": "prediction $x$"}


def surfaces(grids: Mapping[tuple[str, str], tuple]) -> Image:
    """For each (base, rule) the axes of prediction and target, and the loss over both: the darker the smaller."""
    axes = panels(3, 3, (8.5, 5.8), sharey=True)
    for panel, ((base, rule), (prediction, target, loss)) in zip(axes.flat, grids.items()):
        panel.contourf(array(prediction), array(target), np.sqrt(array(loss)), levels=16, cmap="cividis")
        panel.set_title(f"{base} × {rule}")
        panel.set_xlabel(BASES[base])
    for panel in axes[:, 0]:
        panel.set_ylabel("target $y$")
    return show(axes)


def cuts(found: Mapping[tuple[str, str], tuple]) -> Image:
    """For each (base, rule) prediction, plain loss, loss and gradient."""
    axes = panels(3, 3, (9, 6.6))
    for panel, ((base, rule), (prediction, plain, loss, gradient)) in zip(axes.flat, found.items()):
        for values, style in (
            (plain, dict(color=GREY, linewidth=1, linestyle=":", label="plain loss")),
            (loss, dict(color=BLUE, linewidth=2, label="loss")),
            (gradient, dict(color=ORANGE, linewidth=1.5, linestyle="--", label="gradient")),
        ):
            panel.plot(array(prediction), array(values), **style)
        panel.axhline(0, color="black", linewidth=0.5)
        panel.set_title(f"{base} × {rule}")
        panel.set_xlabel(BASES[base])
        panel.set_ylim({"bce": (-8, 4), "bce_with_logits": (-2.5, 4.5), "mse": (-6.5, 4)}[base])
    axes[0, 0].legend(loc="lower right", fontsize=8)
    return show(axes)


def minima(p, expected: Mapping[float, object], x, losses: Mapping[float, object]) -> Image:
    """Left the expected loss for each share of positives, right the loss for each target; where training can stop."""
    axes = panels(1, 2, (9, 3.2))
    (left, right), p, x = axes.flat, array(p), array(x)
    for (q, values), color in zip(expected.items(), (GREEN, ORANGE, BLUE)):
        honest = np.abs(p - q).argmin()
        left.plot(p, array(values), color=color, linewidth=1.8, label=f"$q$ = {q}")
        left.plot(p[honest], array(values)[honest], "o", color=color)
    left.axvline(0.7, color="black", linewidth=0.7, linestyle=":")
    left.set(xlabel="predicted $p$", ylabel="expected loss", ylim=(0, 1.0), title="ByPrediction: threshold_bce_loss")
    left.legend(loc="upper left")
    for (y, values), color in zip(losses.items(), (GREEN, ORANGE, BLUE)):
        loss = array(values)
        low = 1 + np.flatnonzero((loss[1:-1] < loss[:-2]) & (loss[1:-1] < loss[2:]))
        stuck = low[np.abs(x[low] - y) > 0.05]
        right.plot(x, loss, color=color, linewidth=1.8, label=f"$y$ = {y}")
        right.plot(x[stuck], loss[stuck], "^", color=color, markersize=8)
    right.axvline(1.0, color="black", linewidth=0.7, linestyle=":")
    right.set(xlabel="prediction $x$", ylabel="loss", ylim=(-0.05, 4.5), title="ByProximity: proximity_mse_loss")
    right.legend(loc="upper right")
    return show(axes)


STYLES = ((GREY, ":"), (BLUE, "-"), (GREEN, "-."), (ORANGE, "--"))


def ranking(found: Mapping[str, tuple], true: Mapping[str, tuple]) -> Image:
    """Left precision over recall, with a dot at p = 0.5; right the share of positives over the predicted probability."""
    axes = panels(1, 2, (9, 3.6))
    left, right = axes.flat
    for (name, (recall, precision, at)), (color, line) in zip(found.items(), STYLES):
        left.plot(recall, precision, color=color, linestyle=line, linewidth=1.8, label=name)
        half = np.searchsorted(at, 0.5)
        left.plot(recall[half], precision[half], "o", color=color)
        right.plot(*true[name], marker="o", markersize=4, color=color, linestyle=line, linewidth=1.8)
    left.set(
        xlabel="recall", ylabel="precision", title="held-out rows; dots: p = 0.5", xlim=(0.3, 1.01), ylim=(0.3, 1.01)
    )
    left.legend(loc="lower left")
    right.axline((0, 0), slope=1, color="black", linewidth=0.7)
    right.text(0.03, 0.93, "diagonal: calibrated")
    right.set(xlabel="predicted $p$", ylabel="share of eights", title="calibration", xlim=(0, 1), ylim=(0, 1))
    return show(axes)


def residuals(predictions: Mapping[str, object], truth, line: float, reach: float) -> Image:
    """Residuals of the first two, and where the predictions of all lie."""
    axes = panels(1, 3, (9.5, 3.3), sharex=True)
    for panel, (name, x), (color, _) in zip(axes.flat, predictions.items(), STYLES):
        panel.plot(x.ravel(), (truth - x).ravel(), ".", color=color, markersize=3, alpha=0.6)
        panel.axhline(0, color="black", linewidth=0.7)
        panel.set(xlabel="predicted", title=name, ylim=(-2.5, 3.2))
    axes[0, 0].set_ylabel("residual: true − predicted")
    last = axes[0, -1]
    last.clear()
    for (name, x), (color, style) in zip(predictions.items(), STYLES):
        last.hist(
            x.ravel(),
            np.arange(-2, 2.5, 0.25),
            histtype="step",
            color=color,
            linestyle=style,
            linewidth=1.6,
            label=name,
        )
    last.set(xlabel="predicted", ylabel="rows", title="where the predictions lie")
    last.set_ylim(top=1.25 * last.get_ylim()[1])
    last.legend(fontsize=8)
    for panel in axes.flat:
        panel.axvspan(line - reach, line + reach, color=PINK, alpha=0.18, linewidth=0)
    return show(axes)


def errors(found: Mapping[str, object], malignant, means: Mapping[str, tuple[float, float]]) -> Image:
    """Left how the errors of features are distributed, right what the factor trades for what."""
    axes = panels(1, 2, (9, 3.4))
    left, right = axes.flat
    for (name, squared), (color, style) in zip(found.items(), STYLES):
        for bad, width in ((False, 1.2), (True, 2.4)):
            values = np.sort(squared[malignant == bad].ravel())
            share = 1 - np.arange(len(values)) / len(values)
            label = f"{name}, {'malignant' if bad else 'benign'}"
            left.plot(values[::20], share[::20], color=color, linestyle=style, linewidth=width, label=label)
    left.axvline(1, color="black", linewidth=0.7)
    left.set(xscale="log", yscale="log", xlim=(0.02, 100), ylim=(1e-5, 1))
    left.set(xlabel="squared error of a feature", ylabel="share of larger ones", title="errors of held-out rows")
    left.legend(loc="lower left", fontsize=8)
    right.plot(*zip(*means.values()), "o-", color=BLUE)
    for name, place in means.items():
        right.annotate(name, place, xytext=(7, -9), textcoords="offset points")
    right.set(xlabel="MSE of benign rows", ylabel="ROC-AUC", title="worse at copying, better at telling")
    right.margins(x=0.25, y=0.15)
    return show(axes)


def folds(columns: Mapping[str, Sequence[tuple]]) -> Image:
    """For each column (label, paired differences, their interval): a dot for each fold."""
    rows = max(map(len, columns.values()))
    axes = panels(rows, len(columns), (3 * len(columns), 1.9 * rows))
    for column, (title, found) in zip(axes.T, columns.items()):
        column[0].set_title(title, fontweight="bold")
        for panel, (label, differences, interval) in zip(column, found):
            heights = np.random.default_rng(0).uniform(-0.3, 0.3, len(differences))
            panel.axvspan(interval.low, interval.high, color=ORANGE, alpha=0.2, linewidth=0)
            panel.axvline(interval.mean, color=ORANGE, linewidth=2)
            panel.plot(differences, heights, "o", color=BLUE, alpha=0.6)
            panel.axvline(0, color="black", linewidth=1)
            reach = 1.15 * np.abs(differences).max()
            panel.set(yticks=[], xlim=(-reach, reach), ylim=(-1, 1), xlabel=label)
            panel.spines["left"].set_visible(False)
            panel.locator_params(axis="x", nbins=5)
    return show(axes)


# --------------------------------------------------------------------------------------------- 03: thresholds that learn
def surrogate(x, theta: float, bandwidth: float, values: Mapping, pushes: Mapping, pulls: Mapping) -> Image:
    """Values, gradients to the threshold, gradients to the input; grey: the window."""
    axes = panels(1, 3, (11.5, 3.2), sharex=True)
    for panel, found in zip(axes.flat, (values, pushes, pulls)):
        for (label, y), color, line in zip(found.items(), (BLUE, ORANGE, "black"), ("-", "--", ":")):
            panel.plot(array(x), array(y), color=color, linestyle=line, label=label)
        panel.axvspan(theta - bandwidth / 2, theta + bandwidth / 2, color=GREY, alpha=0.15, linewidth=0)
        panel.set_xlabel("x")
        panel.legend(loc="upper left")
    axes[0, 0].set_title(f"value, θ = {theta:g}")
    axes[0, 1].set(title=f"gradient to θ, ε = {bandwidth:g}", ylim=(-2.4, 1.4))
    axes[0, 2].set(title="jumprelu: gradient to x", ylim=(-1.2, 3.2))
    return show(axes)


def window(
    samples, density, theta: float, bandwidths, found, truth: float, bias, scatter, drawn: Sequence[float]
) -> Image:
    """Inputs and two windows; the estimates over the bandwidth; their error, and what it is made of."""
    axes = panels(1, 3, (11.5, 3.3))
    left, middle, right = axes.flat
    grid = np.linspace(-0.8, 1.7, 500)
    left.hist(
        array(samples).ravel(), bins=120, range=(-0.8, 1.7), density=True, color=BLUE, alpha=0.35, label="samples"
    )
    left.plot(grid, density(grid), color=BLUE, label="p(x)")
    left.axvline(theta, color="black", linewidth=1, label=f"θ = {theta:g}")
    for width, color in zip(drawn, (GREEN, ORANGE)):
        ends = [theta - width / 2, theta + width / 2]
        left.plot(ends, [-0.06 * width] * 2, color=color, linewidth=5, label=f"ε = {width:g}")
    left.set(title="inputs of one feature, and two windows", xlabel="x", ylabel="density")
    mean, spread, error = found.mean(1), found.std(1), np.sqrt(np.square(found - truth).mean(1))
    middle.fill_between(
        bandwidths, mean - spread, mean + spread, color=BLUE, alpha=0.2, linewidth=0, label="± one deviation"
    )
    middle.plot(bandwidths, mean, color=BLUE, marker="o", markersize=3, label="mean of all batches")
    middle.axhline(truth, color="black", linestyle="--", linewidth=1, label="−p(θ), exact")
    middle.set(title="estimates of dθ from one batch", xlabel="bandwidth ε", ylabel="dθ", xscale="log", ylim=(-1, 0.8))
    right.plot(bandwidths, error, color=BLUE, marker="o", markersize=4, linestyle="none", label="a batch's error (rms)")
    right.plot(bandwidths, scatter, color=GREEN, label="its scatter, exact")
    right.plot(bandwidths, bias, color=ORANGE, linestyle="--", label="its bias, exact")
    right.set(
        title=f"least error near ε = {bandwidths[error.argmin()]:.2g}", xlabel="bandwidth ε", xscale="log", yscale="log"
    )
    right.set_ylim(1e-3, 20)
    for panel in axes.flat:
        panel.legend(loc="upper right")
    return show(axes)


def thresholds(histories: Mapping[float, object], scores, theta: float, bandwidth: float) -> Image:
    """For each λ its thresholds, [times, features], while they train and at the end; and one feature's inputs."""
    axes = panels(1, 3, (11.5, 3.6), width_ratios=(1.25, 1, 1))
    paths, ends, one = axes.flat
    for (weight, history), color in zip(histories.items(), (BLUE, GREEN, ORANGE)):
        low, high = np.quantile(history, (0.1, 0.9), axis=1)
        steps = 10 * np.arange(len(history))
        paths.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
        paths.plot(steps, history[:, ::24], color=color, linewidth=0.6, alpha=0.8)
        paths.plot(steps, np.median(history, axis=1), color=color, linewidth=2, label=f"λ = {weight:g}")
        ends.hist(history[-1], bins=40, range=(0.1, 1.6), color=color, alpha=0.55)
        for line in (paths.axhline, ends.axvline):
            line(np.sqrt(weight), color=color, linestyle="--", linewidth=1)
    paths.set(title="thresholds during training (dashed: √λ)", xlabel="step", ylabel="θ")
    paths.legend(loc="upper left", ncols=2)
    ends.set(title="after training", xlabel="θ", ylabel="features")
    one.hist(scores, bins=60, color=GREY, alpha=0.5)
    one.axvspan(theta - bandwidth / 2, theta + bandwidth / 2, color=ORANGE, alpha=0.25, linewidth=0, label="window")
    one.axvline(theta, color=ORANGE, label=f"θ = {theta:.2f}")
    one.set(title=f"z of one feature, {np.mean(scores > theta):.0%} kept", xlabel="z", ylabel="held-out rows")
    one.legend()
    return show(axes)


def frontier(found: Mapping[str, tuple]) -> Image:
    """For each kind of autoencoder L0, R² and γ, each [weights, folds]."""
    axes = panels(1, 2, (10.5, 4))
    for (name, (l0, r2, gamma)), color, marker in zip(found.items(), (BLUE, ORANGE), "os"):
        for panel, values in zip(axes.flat, (r2, gamma)):
            panel.plot(l0.mean(1), values.mean(1), color=color, linewidth=1.5)
            panel.plot(l0.ravel(), values.ravel(), marker, color=color, markersize=4, alpha=0.5, label=name)
    left, right = axes.flat
    left.set(title="held-out rows: up and to the left is better", ylabel="R² of the reconstruction")
    right.axhline(1, color="black", linewidth=1, linestyle=":")
    right.set(title="shrinkage: below 1 reconstructions are too small", ylabel="γ = ‖x̂‖² / ⟨x̂, x⟩")
    for panel in axes.flat:
        panel.set(xlabel="features of a row (L0)", xscale="log")
        panel.set_xticks(ticks := (4, 8, 16, 32), ticks)
        panel.xaxis.minorticks_off()
    left.legend(loc="lower right")
    return show(axes)


def widths(found: Mapping[float, tuple], start: float, root: float) -> Image:
    """For each bandwidth the share of thresholds that never moved, the median threshold and the loss of each fold."""
    axes = panels(1, 3, (11.5, 3.4), sharex=True)
    at = list(found)
    for panel, values, color in zip(axes.flat, zip(*found.values()), (GREY, BLUE, ORANGE)):
        values = np.array(values)
        panel.plot(at, values, color=color, marker="o", markersize=5, alpha=0.7, linestyle="none")
        panel.plot(at, values.mean(1), color=color)
        panel.set(xlabel="bandwidth ε", xscale="log")
    stuck, where, cost = axes.flat
    stuck.set(title="thresholds that never moved", ylabel="share", ylim=(-0.05, 1.05))
    where.axhline(start, color=GREY, linestyle=":", label="where they start")
    where.axhline(root, color="black", linestyle="--", linewidth=1, label="√λ")
    where.set(title="median threshold after training", ylabel="θ", ylim=(0, None))
    where.legend(loc="upper left")
    cost.set(title="squared error + λ L0, held-out rows", ylabel="loss")
    return show(axes)


def features(directions, averages, labels: Sequence[str]) -> Image:
    """A feature's direction, and below it the mean of the digits that excite it most."""
    axes = panels(2, len(labels), (11.5, 2.7))
    for (top, bottom), direction, average, label in zip(axes.T, directions, averages, labels):
        top.imshow(array(direction).reshape(8, 8), cmap="RdBu_r", vmin=-0.6, vmax=0.6)
        top.set_title(label, fontsize=8)
        bottom.imshow(array(average).reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
    for panel in axes.flat:
        panel.set_axis_off()
    return show(axes)


def sums(rows: Sequence[tuple]) -> Image:
    """For each row its digit, its reconstruction, and its largest terms as (image, label)."""
    axes = panels(len(rows), 2 + len(rows[0][2]), (8, 4.9))
    for line, (digit, (drawn, count), terms) in zip(axes, rows):
        line[0].imshow(array(digit).reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
        line[0].set_title("digit", fontsize=8)
        line[1].imshow(array(drawn).reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
        line[1].set_title(f"from {count} features", fontsize=8)
        for panel, (image, label) in zip(line[2:], terms):
            panel.imshow(array(image).reshape(8, 8), cmap="RdBu_r", vmin=-2, vmax=2)
            panel.set_title(label, fontsize=8)
    for panel in axes.flat:
        panel.set_axis_off()
    return show(axes)


# -------------------------------------------------------------------------------------------------------- 04: benchmarks
PROVIDERS = {"eager": GREY, "compiled": YELLOW, "compiled_grad": GREEN, "this": BLUE}


def calls(found: Mapping[str, Sequence[tuple[str, float]]]) -> Image:
    """A bar for each call, starting where the last one ended; below them what compiling and fusing leave."""
    axes = panels(1, 1, (9, 4.6))
    panel, names, end = axes[0, 0], [], 0.0
    for (kind, made), color in zip(found.items(), (GREY, "#56B4E9")):
        for name, size in made:
            panel.barh(
                len(names), size, left=end, color=color, label=f"eager, {kind}" if (name, size) == made[0] else None
            )
            names.append(name)
            end += size
    for name, size, label in (("two kernels", 5, "compiled"), ("one kernel", 3, "this")):
        panel.barh(len(names), size, color=PROVIDERS[label], label=f"{label}, both")
        names.append(name)
    panel.set_yticks(range(len(names)), names, fontsize=9)
    panel.invert_yaxis()
    panel.set(
        xlabel="bytes an element / s",
        title=f"a weighted squared error: {end:.3g}·s call by call, 5·s compiled, 3·s fused",
    )
    panel.grid(axis="x", alpha=0.25)
    panel.legend(loc="upper right")
    return show(axes)


def moved(found: Sequence[Mapping], markers: Mapping[str, str]) -> Image:
    """For each op the bytes an element of each provider, and how many times as many eager torch moves."""
    axes = panels(1, 1, (9, 0.3 * len(found) + 1.3))
    panel = axes[0, 0]
    for place, line in enumerate(found):
        panel.plot([line["this"], line["eager"]], [place, place], color="#dddddd", linewidth=3, zorder=1)
        factor = f"{line['eager'] / line['this']:.2g}×"
        panel.annotate(factor, (line["eager"], place), xytext=(8, -3), textcoords="offset points", fontsize=8.5)
    for provider, marker in markers.items():
        points = [(line[provider], place) for place, line in enumerate(found) if line[provider] is not None]
        style = dict(markersize=11, fillstyle="none") if provider == "compiled_grad" else dict(markersize=7, alpha=0.85)
        panel.plot(*zip(*points), marker, color=PROVIDERS[provider], label=provider, **style)
    panel.set_yticks(range(len(found)), [line["op"].removeprefix("threshold_loss.") for line in found], fontsize=9)
    panel.set(xscale="log", xlim=(6, 400), xlabel="bytes an element of a training step, float32")
    panel.set_xticks(ticks := (8, 16, 32, 64, 128, 256), ticks)
    panel.minorticks_off()
    panel.invert_yaxis()
    panel.grid(axis="x", alpha=0.25)
    panel.legend(loc="upper right")
    return show(axes)


def bounds(found: Mapping[str, Mapping[str, Mapping[str, float]]], title: str) -> Image:
    """For each dtype and kernel the least time an element takes by each bound."""
    rows = max(map(len, found.values()))
    axes = panels(1, len(found), (11.5, 0.42 * rows + 1), sharex=True, sharey=True)
    for panel, (dtype, by_kernel) in zip(axes.flat, found.items()):
        for nth, (bound, color) in enumerate({"bytes": BLUE, "issue": ORANGE, "special functions": "#999999"}.items()):
            times = [kernel[bound] for kernel in by_kernel.values()]
            panel.barh(np.arange(len(times)) + 0.27 * (nth - 1), times, height=0.25, color=color, label=bound)
        panel.set_yticks(range(len(by_kernel)), list(by_kernel), fontsize=9)
        panel.set(xlabel="least time, picoseconds an element", ylim=(len(by_kernel) - 0.5, -0.5), title=dtype)
        panel.grid(axis="x", alpha=0.25)
    axes.flat[-1].legend(loc="upper right")
    axes.flat[0].figure.suptitle(title, fontsize=10)
    return show(axes)
