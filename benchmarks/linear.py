"""Time and memory of linear_threshold_loss beside the formula written out: ``python -m benchmarks.linear``.

Each case runs in a process of its own, whose peak is that of the case alone. The extra memory is the peak of the resident set
beyond inputs and gradients.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import triton_thresh as tt
from benchmarks import records

SIZES = {"wide": (1024, 256, 50_000, 8), "million": (256, 64, 1_000_000, 8)}  # rows, features, labels, labels of a row
CASES = ("bce_with_logits ByPrediction", "focal", "asymmetric")
PROVIDERS = ("written out", "triton_thresh")
STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class LinearRecord:
    """One case, size, provider and number of threads; times are the least of `runs` steps forward and backward.

    cpu_ms is the time of all threads, which other processes on the machine disturb less; load is the load average meanwhile.
    """

    case: str
    provider: str
    rows: int
    features: int
    labels: int
    labels_per_row: int
    threads: int
    runs: int
    ms: float
    cpu_ms: float
    extra_bytes: int
    gradient_bytes: int
    load: float
    device: str
    torch: str
    commit: str
    timestamp: str


def written(case: str, input: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    """The loss in plain torch, as a user would write it."""
    logits = F.linear(input, weight, bias)
    y = torch.zeros_like(logits).scatter_(1, labels, 1.0)
    p = logits.sigmoid()
    if case == "asymmetric":
        q = (1 - p + 0.05).clamp(max=1)
        cross = y * torch.log(p.clamp(min=1e-8)) + (1 - y) * torch.log(q.clamp(min=1e-8))
        return (-cross * (1 - (p * y + q * (1 - y))) ** (y + 4 * (1 - y))).mean()
    cross = F.binary_cross_entropy_with_logits(logits, y, reduction="none")
    if case == "focal":
        p_t = p * y + (1 - p) * (1 - y)
        return ((0.25 * y + 0.75 * (1 - y)) * (1 - p_t) ** 2 * cross).mean()
    return (cross * torch.where(p >= 0.7, 1.0, 0.1)).mean()


def ours(case: str, input: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    base: Any = {"focal": tt.Focal(), "asymmetric": tt.Asymmetric()}.get(case, "bce_with_logits")
    rule = tt.ByPrediction() if case == CASES[0] else None
    return tt.linear_threshold_loss(input, weight, labels=labels, bias=bias, base=base, rule=rule)


def _step(call: Callable[..., Tensor], case: str, tensors: list[Tensor], labels: Tensor) -> Tensor:
    for tensor in tensors:
        tensor.grad = None
    loss = call(case, *tensors, labels)
    loss.backward()
    return loss.detach()


def _made(rows: int, features: int, count: int, each: int) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    tensors = [torch.randn(rows, features), torch.randn(count, features).div_(features**0.5), torch.zeros(count)]
    return [tensor.requires_grad_() for tensor in tensors], torch.randint(0, count, (rows, each))


def _resident(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text())
    assert found is not None
    return int(found[1]) * 1024


def measure(case: str, size: str, provider: str, threads: int, runs: int) -> dict[str, Any]:
    """A case, in this process."""
    torch.set_num_threads(threads)
    call = ours if provider == PROVIDERS[1] else written
    _step(call, case, *_made(64, 16, 2000, 2))  # libraries take their memory at their first call
    tensors, labels = _made(*SIZES[size])
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    best = cpu = float("inf")
    load, extra = os.getloadavg()[0], 0
    gradients = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    for run in range(runs):
        start, used = time.perf_counter(), time.process_time()
        _step(call, case, tensors, labels)
        best = min(best, time.perf_counter() - start)
        cpu = min(cpu, time.process_time() - used)
        if run == 0:
            extra = _resident("VmHWM") - before - gradients
    return dict(
        zip(("rows", "features", "labels", "labels_per_row"), SIZES[size]),
        case=case, provider=provider, threads=threads, runs=runs, ms=best * 1e3, cpu_ms=cpu * 1e3, extra_bytes=extra,
        gradient_bytes=gradients, load=load,
    )  # fmt: skip


def _in_a_process(*arguments: object) -> dict[str, Any]:
    # Threads that wait without spinning lose less where other processes want the cores.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", **os.environ}
    command = [sys.executable, "-m", "benchmarks.linear", "--one", *map(str, arguments)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=records.ROOT, env=environment)
    found: dict[str, Any] = json.loads(output.stdout.splitlines()[-1])
    return found


def table(made: list[LinearRecord]) -> list[str]:
    """The records as a table in Markdown, with the ratios to the formula written out."""
    lines = [
        "| case | labels | threads | provider | s | CPU s | extra MiB | time | CPU time | memory |",
        "| --- | --: | --: | --- | --: | --: | --: | --: | --: | --: |",
    ]
    base = {(r.case, r.labels, r.threads): r for r in made if r.provider == PROVIDERS[0]}
    for r in made:
        cells = f"| {r.case} | {r.labels} | {r.threads} | {r.provider} | {r.ms / 1e3:.2f} | {r.cpu_ms / 1e3:.2f} "
        cells += f"| {r.extra_bytes / 2**20:.0f} "
        other = base.get((r.case, r.labels, r.threads))
        ratios = [] if other is None else [r.ms / other.ms, r.cpu_ms / other.cpu_ms, r.extra_bytes / other.extra_bytes]
        lines.append(cells + "| " + " | ".join([f"{ratio:.2f}" for ratio in ratios] or ["", "", ""]) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[2], help="numbers of threads, for instance 2 1")
    parser.add_argument("--runs", type=int, default=3, help="steps, of which the least time counts")
    parser.add_argument("--commit", action="store_true", help="use benchmarks/results/, which git tracks")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        case, size, provider, threads, runs = options.one
        print(json.dumps(measure(case, size, provider, int(threads), int(runs))))
        return
    stamp = records.stamp(torch.device("cpu"))
    made = []
    wanted = [
        (case, "wide", provider, threads) for threads in options.threads for case in CASES for provider in PROVIDERS
    ]
    wanted += [(CASES[0], "million", PROVIDERS[1], threads) for threads in options.threads[:1]]
    for case in wanted:
        facts = _in_a_process(*case, options.runs)
        made.append(
            LinearRecord(**facts, device=stamp.device, torch=stamp.torch, commit=stamp.commit, timestamp=records.now())
        )
        print(table(made)[-1] if made[-1].provider == PROVIDERS[1] else case, flush=True)
    folder = (records.RESULTS if options.commit else records.LOCAL) / "linear" / stamp.folder
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{records.now()[:10]}-{stamp.commit}.jsonl"
    path.write_text("".join(json.dumps(dataclasses.asdict(record)) + "\n" for record in made))
    title = f"linear_threshold_loss, forward and backward, float32: {stamp.device}, torch {stamp.torch}, commit {stamp.commit}"
    load = f"The load average was up to {max(r.load for r in made):.1f} on {os.cpu_count()} cores."
    path.with_suffix(".md").write_text("\n".join([title, "", load, "", *table(made), ""]))
    print(path)


if __name__ == "__main__":
    main()
