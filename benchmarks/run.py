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
from benchmarks.workloads import MODES, WHOLE, Call, Inputs, Workload
from triton_thresh.backend import use_backend
from triton_thresh.registry import OPS, Loss

# The formula in eager torch; torch.compile of it, whose backward is autograd's; torch.compile of torch.func.grad_and_value of it
# (losses alone, forward and backward in one graph); this package; this package with its backend "inductor" (losses alone); and a
# copy, which is the ceiling.
EAGER, COMPILE, GRAD, PACK, COPY = "eager", "torch.compile", "torch.compile+grad", "triton_thresh", "copy"
ONE_PASS = "triton_thresh+inductor"
PROVIDERS = (EAGER, COMPILE, GRAD, PACK, ONE_PASS)
OTHERS = tuple(name for name in PROVIDERS if name != PACK)
DTYPES = ("float32", "bfloat16", "float16")
EVERY_SIZE = tuple(range(31))
MOST_SETS = 8  # of inputs that rotate
WARM_UPS = 3


class Defaults(NamedTuple):
    """The cases that are measured where nothing else is asked for, the most telling sizes first."""

    sizes: tuple[int, ...]
    dtypes: tuple[str, ...]
    modes: tuple[str, ...]


DEFAULTS = {
    "cuda": Defaults((26, 20, 12, 28, 24), ("bfloat16", "float32"), MODES),
    "cpu": Defaults((20, 16, 12, 8), ("float32",), ("forward", "both")),  # the first run compiles for minutes
}


@dataclass(frozen=True)
class Plan:
    """The cases to measure; sizes are exponents of 2."""

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
            ops = (OPS[name] for name in self.ops)
            yield dtype, 1 << size, [w for op in ops for w in workloads.workloads(op, dtype, 1 << size, self.device)]

    def cases(self, workload: Workload) -> list[tuple[str, str]]:
        """Modes and providers, the providers of a mode one after the other: they meet the same moments of a busy machine."""
        return [
            (mode, provider)
            for mode, provider in itertools.product(MODES, self.providers)
            if mode in self.modes
            and mode in workload.modes
            and (workload.compiles or provider not in (COMPILE, GRAD))
            and (provider != GRAD or (workload.whole and mode == "both"))
            and (provider != ONE_PASS or isinstance(workload.op, Loss))
        ]

    def __len__(self) -> int:
        return sum(1 + sum(len(self.cases(w)) for w in found) for _, _, found in self.groups())


def plan(
    device: str = "auto",
    full: bool = False,
    ops: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    sizes: Sequence[int] | None = None,
    modes: Sequence[str] | None = None,
    providers: Sequence[str] | None = None,
) -> Plan:
    """The cases asked for, and the device's defaults for the rest."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU")
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    default = DEFAULTS[kind]
    if full:
        every = tuple(dict.fromkeys((*default.sizes, *EVERY_SIZE)))
        default = Defaults(every, DTYPES, MODES)
    return Plan(
        ops=tuple(ops or OPS),
        dtypes=tuple(dtypes or default.dtypes),
        sizes=tuple(sizes or default.sizes),
        modes=tuple(modes or default.modes),
        providers=tuple(providers or PROVIDERS),
        device=torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device("cpu"),
    )


def device_failed(device: torch.device) -> bool:
    """True if an error left the device unable to run anything more in this process."""
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
    if mode == WHOLE:
        return Step(lambda i: [t.detach() for t in sets[i % len(sets)].tensors], lambda tensors: call(*tensors))

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
        step = functools.partial(step_of, torch.clone, mode="forward")
        record = self._measure(COPY, dtype, numel, "forward", COPY, size, lambda: (step(self.sets(make)), None))
        if record.gbps:
            self.copy_gbps[dtype, numel] = record.gbps
        return record

    def case(
        self, workload: Workload, provider: str, call: Call, mode: str, sets: Callable[[], Sequence[Inputs]]
    ) -> Record:
        """Check one call, then measure it."""
        way = WHOLE if provider == GRAD else mode

        def prepared() -> tuple[Step, str | None]:
            inputs = sets()
            workloads.check(workload, call, way, strict=provider in (PACK, ONE_PASS), inputs=inputs[0])
            return step_of(call, inputs, way), workload.blocks(inputs[0], mode) if provider == PACK else None

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
        prepared: Callable[[], tuple[Step, str | None]],
    ) -> Record:
        times: Times | None = None
        peak: int | None = None
        host: float | None = None
        launches: int | None = None
        blocks: str | None = None
        error: str | None = None
        try:
            step, blocks = prepared()
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
    return torch.compile(call, fullgraph=True, dynamic=False)


def in_one_pass(call: Call) -> Call:
    """The call with the backend "inductor"; backward goes the way that forward went."""

    def passed(*tensors: torch.Tensor) -> Any:
        with use_backend("inductor"):
            return call(*tensors)

    return passed


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
            missing = [case for case in plan.cases(workload) if (workload.name, label, numel, *case) not in done]
            calls: dict[str, Call] = {EAGER: workload.eager, PACK: workload.pack, ONE_PASS: in_one_pass(workload.pack)}
            for provider, formula in ((COMPILE, workload.eager), (GRAD, workload.whole)):
                if formula and any(provider == asked for _, asked in missing):
                    calls[provider] = compiled(formula)
            sets = functools.cache(functools.partial(bench.sets, workload.make))
            torch._dynamo.reset()
            for mode, provider in missing:
                if time.monotonic() > deadline:
                    return
                yield bench.case(workload, provider, calls[provider], mode, sets)
            if plan.device.type == "cuda":
                del sets
                torch.cuda.empty_cache()
