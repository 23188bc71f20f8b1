"""Measures every op of the registry and writes a record a line, when it is made."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from benchmarks import records, workloads
from benchmarks.records import Record, Stamp
from benchmarks.timing import Step, Timer, Times
from benchmarks.workloads import MODES, Call, Inputs, Workload
from triton_thresh.registry import OPS

EAGER, COMPILE, PACK, COPY = "eager", "torch.compile", "triton_thresh", "copy"
PROVIDERS = (EAGER, COMPILE, PACK)
DTYPES = ("float32", "bfloat16", "float16")
EVERY_SIZE = tuple(range(31))
MOST_SETS = 8  # of inputs that rotate
WARM_UPS = 3


class Defaults(NamedTuple):
    """What is measured where nothing else is asked for, the most telling sizes first."""

    sizes: tuple[int, ...]
    dtypes: tuple[str, ...]
    providers: tuple[str, ...]


DEFAULTS = {
    "cuda": Defaults((26, 20, 12, 28, 24), ("bfloat16", "float32"), PROVIDERS),
    # torch.compile takes tens of seconds an op on a CPU: only where it is asked for
    "cpu": Defaults((20, 16, 12), ("float32", "bfloat16"), (EAGER, PACK)),
}


@dataclass(frozen=True)
class Plan:
    """What to measure; sizes are exponents of 2."""

    ops: tuple[str, ...]
    dtypes: tuple[str, ...]
    sizes: tuple[int, ...]
    modes: tuple[str, ...]
    providers: tuple[str, ...]
    device: torch.device

    def groups(self) -> Iterator[tuple[torch.dtype, int, list[Workload]]]:
        """The workloads of each size and dtype."""
        for size, label in itertools.product(self.sizes, self.dtypes):
            dtype = getattr(torch, label)
            made = [w for op in OPS.values() for w in workloads.workloads(op, dtype, 1 << size, self.device)]
            yield dtype, 1 << size, [w for w in made if w.name in self.ops or w.op.name in self.ops]

    def modes_of(self, workload: Workload) -> list[str]:
        return [mode for mode in MODES if mode in self.modes and mode in workload.modes]

    def __len__(self) -> int:
        return sum(1 + len(self.providers) * sum(len(self.modes_of(w)) for w in found) for _, _, found in self.groups())


def plan(
    device: str = "auto",
    full: bool = False,
    ops: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    sizes: Sequence[int] | None = None,
    modes: Sequence[str] | None = None,
    providers: Sequence[str] | None = None,
) -> Plan:
    """What is asked for, and the device's defaults for the rest."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU")
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    default = DEFAULTS[kind]
    if full:
        every = tuple(dict.fromkeys((*default.sizes, *EVERY_SIZE)))
        default = Defaults(every, DTYPES, PROVIDERS)
    every_op = tuple(dict.fromkeys((*OPS, *workloads.names())))
    known = {"ops": every_op, "dtypes": (*DTYPES, "float64"), "modes": MODES, "providers": PROVIDERS}
    for name, asked in (("ops", ops), ("dtypes", dtypes), ("modes", modes), ("providers", providers)):
        if unknown := [value for value in asked or () if value not in known[name]]:
            raise ValueError(f"--{name}: expected some of {', '.join(known[name])}; got {', '.join(unknown)}")
    return Plan(
        ops=tuple(ops or every_op),
        dtypes=tuple(dtypes or default.dtypes),
        sizes=tuple(sizes or default.sizes),
        modes=tuple(modes or MODES),
        providers=tuple(providers or default.providers),
        device=torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device("cpu"),
    )


def device_failed(device: torch.device) -> bool:
    """Whether an error left the device unable to run anything more in this process."""
    if device.type == "cpu":
        return False
    try:
        torch.cuda.synchronize(device)
    except Exception:
        return True
    return False


class DeviceFailedError(RuntimeError):
    """The device runs nothing more in this process."""


def step_of(call: Call, sets: Sequence[Inputs], mode: str) -> Step:
    """The timed part of a mode over rotating inputs. For "forward" gradients must be off around it."""
    if mode == "forward":
        return Step(lambda i: sets[i % len(sets)].tensors, lambda tensors: call(*tensors))

    def both(inputs: Inputs) -> Any:
        return workloads.gradients(call(*inputs.tensors), inputs)

    def forward(i: int) -> Any:
        inputs = sets[i % len(sets)]
        return call(*inputs.tensors), inputs

    if mode == "both":
        return Step(lambda i: sets[i % len(sets)], both)
    return Step(forward, lambda state: workloads.gradients(*state))


class Bench:
    """Measures one case at a time on one device."""

    def __init__(self, device: torch.device, timer: Timer, stamp: Stamp, write: Callable[[Record], None]) -> None:
        self.device, self.timer, self.stamp, self.write = device, timer, stamp, write
        self.copy_gbps: dict[tuple[torch.dtype, int], float] = {}

    def sets(self, make: Callable[[int], Inputs]) -> list[Inputs]:
        """One set of inputs, or as many as do not fit in the cache."""
        first = make(0)
        fit = math.ceil(2 * self.timer.cache_bytes / max(1, first.bytes))
        count = min(MOST_SETS, fit) if first.bytes < self.timer.cache_bytes else 1
        return [first, *(make(seed) for seed in range(1, count))]

    def copy(self, dtype: torch.dtype, numel: int) -> Record:
        """The ceiling: a copy of as many elements into a tensor allocated for it, as the ops' outputs are."""

        def make(seed: int) -> Inputs:
            return Inputs((torch.full((numel,), seed, dtype=dtype, device=self.device),))

        size = 2 * numel * dtype.itemsize
        record = self._measure(COPY, dtype, numel, "forward", COPY, size, lambda: (torch.clone, self.sets(make), None))
        if record.gbps:
            self.copy_gbps[dtype, numel] = record.gbps
        return record

    def case(
        self, workload: Workload, provider: str, call: Call, mode: str, sets: Callable[[], Sequence[Inputs]]
    ) -> Record:
        """Check one call, then measure it."""

        def prepared() -> tuple[Call, Sequence[Inputs], str | None]:
            inputs = sets()
            workloads.check(workload, call, mode, strict=provider == PACK, inputs=inputs[0])
            return call, inputs, workload.blocks(inputs[0], mode) if provider == PACK else None

        return self._measure(
            workload.name, workload.dtype, workload.numel, mode, provider, workload.bytes[mode], prepared
        )

    def _measure(
        self,
        op: str,
        dtype: torch.dtype,
        numel: int,
        mode: str,
        provider: str,
        size: int,
        prepared: Callable[[], tuple[Call, Sequence[Inputs], str | None]],
    ) -> Record:
        times: Times | None = None
        peak: int | None = None
        host: float | None = None
        launches: int | None = None
        blocks: str | None = None
        error: str | None = None
        try:
            call, sets, blocks = prepared()
            step = step_of(call, sets, mode)
            with torch.set_grad_enabled(mode != "forward"):
                for number in range(WARM_UPS):
                    step.call(step.prepare(number))
                times = self.timer.times(step)
                host = self.timer.host_us(step)
                peak = self.timer.peak_bytes(step)
                launches = self.timer.launches(step)
        except Exception as caught:
            error = f"{type(caught).__name__}: {caught}".strip()[:400]
        gbps = size / times.ms / 1e6 if times and times.ms and size else None
        ceiling = self.copy_gbps.get((dtype, numel), gbps if provider == COPY else None)
        record = Record(
            op=op,
            dtype=str(dtype).removeprefix("torch."),
            numel=numel,
            mode=mode,
            provider=provider,
            ms=_rounded(times and times.ms),
            ms_p20=_rounded(times and times.ms_p20),
            ms_p80=_rounded(times and times.ms_p80),
            bytes=size,
            gbps=_rounded(gbps),
            copy_fraction=_rounded(gbps / ceiling if gbps and ceiling else None),
            peak_bytes=peak,
            host_us=_rounded(host),
            launches=launches,
            **asdict(self.stamp),
            timestamp=records.now(),
            blocks=blocks,
            error=error,
        )
        self.write(record)
        if error and device_failed(self.device):
            raise DeviceFailedError(error)
        return record


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def compiled(call: Call) -> Call:
    """torch.compile's best case: the whole formula in one graph, for these shapes."""
    torch._dynamo.reset()
    return torch.compile(call, fullgraph=True, dynamic=False)


def measure(
    plan: Plan, bench: Bench, done: frozenset[tuple[Any, ...]] = frozenset(), deadline: float = math.inf
) -> Iterator[Record]:
    """Every case of the plan that is not done, until the deadline (of time.monotonic)."""
    for dtype, numel, found in plan.groups():
        if time.monotonic() > deadline:
            return
        yield bench.copy(dtype, numel)
        label = str(dtype).removeprefix("torch.")
        for workload in found:
            missing = [
                (mode, provider)
                for mode in plan.modes_of(workload)
                for provider in plan.providers  # one after the other, so that they meet the same moments of a busy machine
                if (workload.name, label, numel, mode, provider) not in done
                and (workload.compiles or provider != COMPILE)
            ]
            calls: dict[str, Call] = {EAGER: workload.eager, PACK: workload.pack}
            if any(provider == COMPILE for _, provider in missing):
                calls[COMPILE] = compiled(workload.eager)
            sets = functools.cache(functools.partial(bench.sets, workload.make))
            for mode, provider in missing:
                if time.monotonic() > deadline:
                    return
                yield bench.case(workload, provider, calls[provider], mode, sets)
            if plan.device.type == "cuda":
                del sets
                torch.cuda.empty_cache()
