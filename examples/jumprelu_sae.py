"""Train sparse autoencoders on data whose features are known, and count the features that come back.

A row is the sum of a few directions out of many more than it has dimensions (superposition). JumpReLU with an L0 penalty,
BatchTopK, and ReLU with an L1 penalty get the same rows and are held at the same number of active features. It runs from a clone,
by ``python -m examples.jumprelu_sae --features 1024``, and needs matplotlib for its picture.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import triton_thresh as tt

ACTIVE = 4  # features of a row
THRESHOLD, BANDWIDTH = 0.3, 0.2  # sizes are 0.5 to 1.5; the window is wide enough that scores fall into it
LEARNING_RATE = 4e-3
WARM_UP, COOL_DOWN = 0.1, 0.2  # shares of the steps: the penalty grows, the learning rate falls
REVIVE_EVERY, REVIVE_UNTIL = 50, 0.8  # steps, and a share of them
ALIKE = 0.9  # cosine from which a feature counts as recovered
BATCHES = 16  # on which a model is measured
METHODS = ("JumpReLU + L0", "BatchTopK", "ReLU + L1")
PENALTY = {"JumpReLU + L0": (0.2, 0.1), "ReLU + L1": (0.5, 0.03)}  # its first weight, and how fast that follows


class Data:
    """Rows that are sums of `ACTIVE` directions of a known dictionary, each of a size of its own."""

    def __init__(self, features: int, inputs: int, seed: int, device: torch.device) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        self.device = device
        drawn = torch.randn(features, inputs, generator=self.generator, device=device)
        self.dictionary = F.normalize(drawn, dim=-1)

    def batch(self, rows: int) -> Tensor:
        shape, own = (rows, ACTIVE), {"generator": self.generator, "device": self.device}
        which = torch.randint(len(self.dictionary), shape, **own)  # type: ignore[call-overload]
        sizes = 0.5 + torch.rand(shape, **own)  # type: ignore[call-overload]
        return torch.einsum("ra,rai->ri", sizes, self.dictionary[which])


class Coded(NamedTuple):
    """What the encoder makes of rows."""

    code: Tensor
    l0: Tensor  # active features of each row
    fired: Tensor  # how often each feature is active
    penalty: Tensor | None  # of each row


class SparseAutoencoder(nn.Module):
    """The decoder's directions have unit length, so that no penalty can be dodged by a small code and long directions."""

    def __init__(self, method: str, start: Tensor) -> None:
        super().__init__()
        features, inputs = start.shape
        self.method = method
        self.decoder = nn.Parameter(start.clone())
        self.encoder = nn.Parameter(start.clone())
        self.bias = nn.Parameter(torch.zeros(features))
        self.offset = nn.Parameter(torch.zeros(inputs))
        self.jump = tt.nn.JumpReLU(features, THRESHOLD, BANDWIDTH) if method == "JumpReLU + L0" else None
        self.topk = tt.nn.BatchTopK(ACTIVE) if method == "BatchTopK" else None

    def encode(self, x: Tensor) -> Coded:
        scores = torch.addmm(self.bias, x - self.offset, self.encoder.T)
        if self.jump is not None:  # one pass: the code, its penalty, and what fired
            code, l0, fired = tt.jumprelu_l0(scores, self.jump.theta, self.jump.bandwidth, return_fired=True)
            return Coded(code, l0, fired, l0)
        code = scores.relu() if self.topk is None else self.topk(scores)
        active = code.detach() > 0
        return Coded(code, active.sum(-1), active.sum(0), None if self.topk is not None else code.sum(-1))

    def directions(self) -> Tensor:
        return F.normalize(self.decoder, dim=-1)

    def decode(self, code: Tensor) -> Tensor:
        return torch.addmm(self.offset, code, self.directions())

    @torch.no_grad()
    def revive(self, dead: Tensor, directions: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Give features that never fire new directions, and forget how the old ones moved."""
        self.decoder[dead] = self.encoder[dead] = directions
        self.bias[dead] = 0
        if self.jump is not None:
            self.jump.threshold[dead] = THRESHOLD
        for parameter in (self.decoder, self.encoder, self.bias):
            for moment in ("exp_avg", "exp_avg_sq"):
                optimizer.state[parameter][moment][dead] = 0


def recovered(dictionary: Tensor, directions: Tensor) -> float:
    """The share of the dictionary that has a learned direction of its own, of a cosine of `ALIKE` or more."""
    cosine, nearest = (dictionary @ directions.T).max(-1)
    return len(nearest[cosine >= ALIKE].unique()) / len(dictionary)


def schedule(step: int, steps: int) -> tuple[float, float]:
    """Factors of the penalty and of the learning rate."""
    return min(1.0, step / (WARM_UP * steps)), min(1.0, (steps - step) / (COOL_DOWN * steps))


def trained(
    method: str, features: int, inputs: int, steps: int, rows: int, seed: int, device: torch.device
) -> dict[str, Any]:
    """A line of the table, and how the recovered share grew."""
    torch.manual_seed(seed)
    data = Data(features, inputs, seed, device)
    model = SparseAutoencoder(method, F.normalize(data.batch(features), dim=-1)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE, betas=(0.9, 0.99), fused=True)
    start, pace = PENALTY.get(method, (0.0, 0.0))
    weight = torch.tensor(start, device=device)
    fired = torch.zeros(features, dtype=torch.int64, device=device)
    curve, started = [], time.perf_counter()
    for step in range(steps):
        warm, optimizer.param_groups[0]["lr"] = schedule(step, steps)
        optimizer.param_groups[0]["lr"] *= LEARNING_RATE
        x = data.batch(rows)
        coded = model.encode(x)
        residual = x - model.decode(coded.code)
        error = residual.square().sum(-1)
        loss = error.mean()
        if coded.penalty is not None:  # its weight follows the number of active features, and the host reads nothing
            surplus = (coded.l0.detach().float().mean() / ACTIVE - 1).clamp(-1, 1)
            weight = (weight * (pace * surplus).exp()).clamp(1e-3, 10)
            loss = loss + warm * weight * coded.penalty.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if model.jump is not None:
            model.jump.project_()
        fired += coded.fired
        if (step + 1) % REVIVE_EVERY == 0:
            if step < REVIVE_UNTIL * steps:
                dead = (fired == 0).nonzero()[:rows, 0]
                worst = error.detach().topk(len(dead)).indices
                model.revive(dead, F.normalize(residual.detach()[worst], dim=-1), optimizer)
            fired.zero_()
            curve.append((step + 1, recovered(data.dictionary, model.directions().detach())))
    seconds = time.perf_counter() - started
    return {"method": method, **measured(model, data, rows), "seconds": round(seconds, 1), "curve": curve}


@torch.no_grad()
def measured(model: SparseAutoencoder, data: Data, rows: int) -> dict[str, float]:
    """On new rows, with the model as it is used: BatchTopK compares with the threshold that training tracked."""
    model.eval()
    l0, unexplained, total, fired = 0.0, 0.0, 0.0, torch.zeros(len(model.bias), dtype=torch.int64, device=data.device)
    for _ in range(BATCHES):
        x = data.batch(rows)
        coded = model.encode(x)
        l0 += coded.l0.float().mean().item() / BATCHES
        fired += coded.fired
        unexplained += (x - model.decode(coded.code)).square().sum().item()
        total += (x - x.mean(0)).square().sum().item()
    return {
        "l0": round(l0, 2),
        "r2": round(1 - unexplained / total, 3),
        "dead": int((fired == 0).sum()),
        "recovered": round(recovered(data.dictionary, model.directions()), 4),
    }


def draw(table: list[dict[str, Any]], features: int, inputs: int, path: Path) -> None:
    """The recovered share over the steps, and the table in bars."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for line in table:
        left.plot(*zip((0, 0.0), *line["curve"]), label=line["method"])
    left.set(
        xlabel="step", ylabel="features recovered", ylim=(0, 1), title=f"{features} features in {inputs} dimensions"
    )
    left.legend(frameon=False)
    names = [line["method"] for line in table]
    for offset, (key, label) in enumerate((("recovered", "recovered"), ("r2", "variance explained"))):
        bars = right.bar(
            [n + 0.4 * offset for n in range(len(names))], [line[key] for line in table], 0.38, label=label
        )
        right.bar_label(bars, fmt="%.2f", fontsize=8)
    right.set_xticks([n + 0.2 for n in range(len(names))], [f"{line['method']}\nL0 = {line['l0']}" for line in table])
    right.set(ylim=(0, 1.15), title="at the same number of active features")
    right.legend(frameon=False, ncols=2, loc="upper center", fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.jumprelu_sae", description=__doc__)
    parser.add_argument("--features", type=int, default=16_384, help="of the dictionary and of each autoencoder")
    parser.add_argument("--steps", type=int, default=1000, help="of each training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("sae-results"), help="folder")
    args = parser.parse_args(argv)
    inputs, rows = max(args.features // 8, 32), max(args.features // 4, 64)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(
        f"{args.features} features in {inputs} dimensions, {ACTIVE} in a row; {args.steps} steps of {rows} rows on {device}"
    )
    print(f"\n{'':14}{'L0':>7}{'R²':>8}{'dead':>7}{'recovered':>11}{'seconds':>9}")
    table = []
    for method in METHODS:
        line = trained(method, args.features, inputs, args.steps, rows, args.seed, device)
        table.append(line)
        print(
            f"{method:14}{line['l0']:7.2f}{line['r2']:8.3f}{line['dead']:7}{line['recovered']:11.1%}{line['seconds']:9.1f}",
            flush=True,
        )
    args.out.mkdir(parents=True, exist_ok=True)
    draw(table, args.features, inputs, args.out / "jumprelu_sae.png")
    found = {
        "recovered": table[0]["recovered"],
        "features": args.features,
        "inputs": inputs,
        "active": ACTIVE,
        "steps": args.steps,
        "rows": rows,
        "seed": args.seed,
        "device": str(device),
        "torch": torch.__version__,
        "table": table,
    }
    (args.out / "jumprelu_sae.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(
        f"\nJumpReLU found {found['recovered']:.1%} of the dictionary; the picture and the numbers are in {args.out}/"
    )


if __name__ == "__main__":
    main()
