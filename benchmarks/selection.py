"""Time of thresholds from the data beside torch's own selections: ``python -m benchmarks.selection``."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import triton_thresh as tt
from benchmarks import records
from benchmarks.tables import markdown, size
from benchmarks.timing import Step, Timer, timer

SIZES = tuple(1 << exponent for exponent in (8, 12, 16, 20, 24))
DTYPES = ("float32", "bfloat16")
WIDTH = 4096  # of a row
Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class SelectionRecord:
    """Median milliseconds of a call, and of what torch offers for the same."""

    case: str
    dtype: str
    numel: int
    ms: float
    baseline: str
    baseline_ms: float
    threads: int
    device: str
    torch: str
    commit: str
    timestamp: str


def batch_topk(x: Tensor, k: int) -> Tensor:
    """As autoencoders write it."""
    flat = x.relu().flatten()
    values, places = flat.topk(k * x.shape[:-1].numel())
    return torch.zeros_like(flat).scatter(0, places, values).view(x.shape)


def cases(n: int) -> Iterator[tuple[str, str, bool, Call, Call]]:
    """Names of the call and of its baseline, if the input is rows, and both."""
    few, half = max(1, n // 100), (n + 1) // 2
    yield "topk_threshold, 1 %", "topk", False, lambda x: tt.topk_threshold(x, few), lambda x: x.topk(few).values[-1]
    yield "topk_threshold, half", "topk", False, lambda x: tt.topk_threshold(x, half), lambda x: x.topk(half).values[-1]
    yield (
        "quantile_threshold, 0.5",
        "kthvalue",
        False,
        lambda x: tt.quantile_threshold(x, 0.5),
        lambda x: x.kthvalue(half)[0],
    )
    if n <= 1 << 24:  # torch's limit
        yield (
            "quantile_threshold, 0.9", "quantile", False, lambda x: tt.quantile_threshold(x, 0.9),
            lambda x: x.float().quantile(0.9, interpolation="higher"),
        )  # fmt: skip
    if n >= WIDTH:
        yield (
            "topk_threshold, 32 of a row",
            "topk",
            True,
            lambda x: tt.topk_threshold(x, 32, -1),
            lambda x: x.topk(32)[0][..., -1:],
        )
        yield (
            "batch_topk, 32 a row",
            "topk and scatter",
            True,
            lambda x: tt.batch_topk(x, 32),
            lambda x: batch_topk(x, 32),
        )


def _ms(clock: Timer, call: Call, x: Tensor) -> float:
    for _ in range(3):
        call(x)
    return clock.times(Step(lambda _: x, call)).ms


def measure(device: torch.device, sizes: Sequence[int]) -> Iterator[SelectionRecord]:
    """Every case; both calls in turn so that they meet the same moments of a busy machine, and the better of two rounds."""
    stamp, clock = records.stamp(device), timer(device)
    for n in sizes:
        for dtype in DTYPES:
            flat = torch.randn(n, device=device).to(getattr(torch, dtype))
            for case, baseline, rows, call, other in cases(n):
                x = flat.view(-1, WIDTH) if rows else flat
                rounds = [(_ms(clock, call, x), _ms(clock, other, x)) for _ in range(2)]
                ms, baseline_ms = map(min, zip(*rounds))
                where = torch.get_num_threads(), stamp.device, stamp.torch, stamp.commit, records.now()
                yield SelectionRecord(case, dtype, n, ms, baseline, baseline_ms, *where)


def table(made: list[SelectionRecord]) -> str:
    lines = [
        [r.case, r.baseline, r.dtype, size(r.numel), f"{r.ms * 1e3:.4g}", f"{r.baseline_ms * 1e3:.4g}",
         f"{1e3 * (r.ms - r.baseline_ms):+.1f}", f"{r.ms / r.baseline_ms:.2f}"]
        for r in made
    ]  # fmt: skip
    return markdown(["call", "torch's", "dtype", "n", "µs", "torch's µs", "difference", "ratio"], lines, left=3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto is a GPU if there is one"
    )
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=SIZES, help="numbers of elements, for instance 256 65536"
    )
    parser.add_argument("--threads", type=int, default=1, help="on a CPU, for instance 2")
    parser.add_argument("--commit", action="store_true", help="use benchmarks/results/, which git tracks")
    parser.add_argument("--out", type=Path, help="another folder, for instance /tmp/results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cpu" if options.device == "cpu" or not torch.cuda.is_available() else "cuda")
    made = list(measure(device, options.sizes))
    stamp = records.stamp(device)
    folder = options.out or (records.RESULTS if options.commit else records.LOCAL) / "selection" / stamp.folder
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{records.now()[:10]}-{stamp.commit}.jsonl"
    path.write_text("".join(json.dumps(dataclasses.asdict(record)) + "\n" for record in made))
    title = f"Thresholds from the data: {stamp.device}, torch {stamp.torch}, commit {stamp.commit}, {options.threads} threads"
    path.with_suffix(".md").write_text("\n".join([title, "", table(made), ""]))
    print(table(made))
    print(path)


if __name__ == "__main__":
    main()
