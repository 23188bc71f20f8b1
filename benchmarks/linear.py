"""Time and memory of linear_threshold_loss beside the formula written out: ``python -m benchmarks.linear``.

The formula runs as it is, under torch.compile, and under torch.compile with Inductor's own chunks where this torch has them; this
package with its default backend, and with "inductor". Each case runs in a process of its own, whose peak is that of the case
alone. The extra memory is the peak beyond inputs and gradients: of the resident set on a CPU, of torch's allocator on a GPU. With
--sweep it is measured for numbers of labels, for a picture.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import triton_thresh as tt
from benchmarks import records

WIDE, MILLION = (1024, 256, 50_000, 8), (256, 64, 1_000_000, 8)  # rows, features, labels, labels of a row
SWEEP = tuple((256, 64, count, 8) for count in (1000, 4000, 16_000, 64_000, 256_000, 1_000_000))
CASES = ("bce_with_logits ByPrediction", "focal", "asymmetric")
WRITTEN, COMPILED, CHUNKED, PACK, BY_INDUCTOR = PROVIDERS = (
    "written out",
    "torch.compile",
    "torch.compile, chunked",
    "triton_thresh",
    "triton_thresh, inductor",
)
SWEPT = (WRITTEN, COMPILED, PACK)
CHUNKS = {"auto_chunker.enable": True, "auto_chunker.amplify_ratio_threshold": 0}  # of Inductor, wherever it can
STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class LinearRecord:
    """One case, size, provider and number of threads; times are the least of `runs` steps forward and backward.

    cpu_ms is the time of all threads, which other processes on the machine disturb less; load is the load average meanwhile.
    chunked: how many graphs Inductor chunked, if it was asked to.
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
    chunked: int | None = None


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


def _made(rows: int, features: int, count: int, each: int, device: torch.device) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    tensors = [torch.randn(rows, features), torch.randn(count, features).div_(features**0.5), torch.zeros(count)]
    return [tensor.to(device).requires_grad_() for tensor in tensors], torch.randint(0, count, (rows, each)).to(device)


def _resident(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text())
    assert found is not None
    return int(found[1]) * 1024


def _provided(provider: str) -> Callable[..., Tensor]:
    if provider in (COMPILED, CHUNKED):
        return torch.compile(written, fullgraph=True, dynamic=False)
    return written if provider == WRITTEN else ours


def _held(device: torch.device) -> int:
    return _resident("VmRSS") if device.type == "cpu" else torch.cuda.memory_allocated(device)


def _begin(device: torch.device) -> None:
    """The peak begins anew."""
    if device.type == "cpu":
        Path("/proc/self/clear_refs").write_text("5")
    else:
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int:
    return _resident("VmHWM") if device.type == "cpu" else torch.cuda.max_memory_allocated(device)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.cuda.synchronize(device)


def measure(
    case: str, size: tuple[int, int, int, int], provider: str, threads: int, runs: int, device: torch.device
) -> dict[str, Any]:
    """A case, in this process."""
    from torch._inductor import config, metrics

    torch.set_num_threads(threads)
    call = _provided(provider)
    with config.patch(CHUNKS) if provider == CHUNKED else nullcontext():
        if provider == BY_INDUCTOR:
            tt.set_backend("inductor")
        _step(call, case, *_made(64, 16, 2000, 2, device))  # libraries take their memory at their first call
        tensors, labels = _made(*size, device)
        if provider not in (WRITTEN, PACK):  # and so does the compiler
            _step(call, case, tensors, labels)
            for tensor in tensors:
                tensor.grad = None
    gc.collect()
    before = _held(device)
    _begin(device)
    best = cpu = float("inf")
    load, extra = os.getloadavg()[0], 0
    gradients = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    for run in range(runs):
        _wait(device)
        start, used = time.perf_counter(), time.process_time()
        _step(call, case, tensors, labels)
        _wait(device)
        best = min(best, time.perf_counter() - start)
        cpu = min(cpu, time.process_time() - used)
        if run == 0:
            extra = _peak(device) - before - gradients
    return dict(
        zip(("rows", "features", "labels", "labels_per_row"), size),
        case=case, provider=provider, threads=threads, runs=runs, ms=best * 1e3, cpu_ms=cpu * 1e3, extra_bytes=extra,
        gradient_bytes=gradients, load=load, chunked=metrics.num_auto_chunking if provider == CHUNKED else None,
    )  # fmt: skip


def _in_a_process(case: list[Any], device: str) -> dict[str, Any]:
    # Threads that wait without spinning lose less where other processes want the cores.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", **os.environ}
    command = [sys.executable, "-m", "benchmarks.linear", "--device", device, "--one", json.dumps(case)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=records.ROOT, env=environment)
    found: dict[str, Any] = json.loads(output.stdout.splitlines()[-1])
    return found


def table(made: list[LinearRecord]) -> list[str]:
    """The records as a table in Markdown, with the ratios to the formula written out."""
    lines = [
        "| case | labels | threads | provider | s | CPU s | extra MiB | time | CPU time | memory |",
        "| --- | --: | --: | --- | --: | --: | --: | --: | --: | --: |",
    ]
    base = {(r.case, r.labels, r.threads): r for r in made if r.provider == WRITTEN}
    for r in made:
        provider = r.provider + (" (it chunks nothing)" if r.chunked == 0 else "")
        cells = f"| {r.case} | {r.labels} | {r.threads} | {provider} | {r.ms / 1e3:.2f} | {r.cpu_ms / 1e3:.2f} "
        cells += f"| {r.extra_bytes / 2**20:.0f} "
        other = base.get((r.case, r.labels, r.threads))
        ratios = [] if other is None else [r.ms / other.ms, r.cpu_ms / other.cpu_ms, r.extra_bytes / other.extra_bytes]
        lines.append(cells + "| " + " | ".join([f"{ratio:.2f}" for ratio in ratios] or ["", "", ""]) + " |")
    return lines


def _cases(threads: list[int], sweep: bool) -> list[tuple[str, tuple[int, int, int, int], str, int]]:
    from torch._inductor import config

    providers = [each for each in PROVIDERS if each != CHUNKED or hasattr(config, "auto_chunker")]
    if sweep:
        return [(CASES[0], size, provider, threads[0]) for size in SWEEP for provider in SWEPT]
    wide = [(case, WIDE, provider, each) for each in threads for case in CASES for provider in providers]
    return [*wide, (CASES[0], MILLION, PACK, threads[0])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[2], help="numbers of threads, for instance 2 1")
    parser.add_argument("--runs", type=int, default=3, help="steps, of which the least time counts")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto is a GPU if there is one"
    )
    parser.add_argument("--sweep", action="store_true", help="the memory for numbers of labels, into labels.jsonl")
    parser.add_argument("--commit", action="store_true", help="use benchmarks/results/, which git tracks")
    parser.add_argument("--out", type=Path, help="another folder, for instance /tmp/results")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    kind = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(kind)
    if options.one:
        case, size, provider, threads, runs = json.loads(options.one)
        print(json.dumps(measure(case, size, provider, threads, runs, device)))
        return
    stamp = records.stamp(device)
    folder = options.out or (records.RESULTS if options.commit else records.LOCAL) / "linear" / stamp.folder
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ("labels.jsonl" if options.sweep else f"{records.now()[:10]}-{stamp.commit}.jsonl")
    made = []
    for planned in _cases(options.threads, options.sweep):
        facts = _in_a_process([*planned, 1 if options.sweep else options.runs], kind)
        made.append(
            LinearRecord(**facts, device=stamp.device, torch=stamp.torch, commit=stamp.commit, timestamp=records.now())
        )
        print(table(made)[-1], flush=True)
        path.write_text(
            "".join(json.dumps(dataclasses.asdict(record)) + "\n" for record in made)
        )  # now, lest a limit cut it off
    if not options.sweep:
        described = f"{stamp.device}, torch {stamp.torch}, commit {stamp.commit}"
        title = f"linear_threshold_loss, forward and backward, float32: {described}"
        load = f"The load average was up to {max(r.load for r in made):.1f} on {os.cpu_count()} cores."
        path.with_suffix(".md").write_text("\n".join([title, "", load, "", *table(made), ""]))
    print(path)


if __name__ == "__main__":
    main()
