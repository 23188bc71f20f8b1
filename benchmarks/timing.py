"""Time, host time, peak memory and launches of one call, on a CPU and on a GPU.

`ms` is the time of one call on the device: CUDA events around it, the L2 cache flushed before it, and the device kept busy
meanwhile so that the host is ahead. `host_us` is the time until the call returns, with no wait for the device. On a CPU both
are one, taken with `perf_counter_ns`; caches are not flushed there, inputs rotate.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

# Kineto's C++ side writes a line at each start and stop of the profiler unless told otherwise before it is loaded.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

MIB = 1 << 20


class Step(NamedTuple):
    """A timed step: `call` on what `prepare` made of the inputs of this number, untimed."""

    prepare: Callable[[int], Any]
    call: Callable[[Any], Any]


class Times(NamedTuple):
    """Median and 20/80 quantiles, in milliseconds."""

    ms: float
    ms_p20: float
    ms_p80: float


def summarize(samples: Sequence[float]) -> Times:
    """The median and the 20 % and 80 % quantiles, interpolated."""
    if len(samples) == 1:
        return Times(samples[0], samples[0], samples[0])
    low, _, _, high = statistics.quantiles(samples, n=5, method="inclusive")
    return Times(statistics.median(samples), low, high)


class Timer(ABC):
    """A way of measuring on one kind of device."""

    def __init__(self, budget_ms: float, least: int, most: int) -> None:
        self.budget_ms, self.least, self.most = budget_ms, least, most

    def repetitions(self, ms: float) -> int:
        """How many calls of so many ms fit in the budget, between `least` and `most`."""
        return max(self.least, min(self.most, math.ceil(self.budget_ms / max(ms, 1e-6))))

    @abstractmethod
    def times(self, step: Step) -> Times:
        """The times of calls that are already warm."""

    @abstractmethod
    def host_us(self, step: Step) -> float | None:
        """Until a call returns, without a wait for the device; None where that is the time itself."""

    @abstractmethod
    def peak_bytes(self, step: Step) -> int | None:
        """The most memory in use during the call beyond the inputs: what `prepare` left counts."""

    @abstractmethod
    def launches(self, step: Step) -> int | None:
        """Kernels (with copies and fills) that a call starts on the device."""

    @property
    @abstractmethod
    def cache_bytes(self) -> int:
        """The cache that inputs should not stay in."""


def _nanoseconds(step: Step, number: int, clock: Callable[[], int]) -> int:
    state = step.prepare(number)
    start = clock()
    result = step.call(state)
    taken = clock() - start
    del result
    return taken


class CpuTimer(Timer):
    def __init__(
        self,
        budget_ms: float = 80,
        least: int = 7,
        most: int = 60,
        clock: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        super().__init__(budget_ms, least, most)
        self.clock = clock

    def times(self, step: Step) -> Times:
        estimate = min(_nanoseconds(step, i, self.clock) for i in range(2)) / 1e6
        return summarize([_nanoseconds(step, i, self.clock) / 1e6 for i in range(self.repetitions(estimate))])

    def host_us(self, step: Step) -> float | None:
        return None

    def peak_bytes(self, step: Step) -> int | None:
        """From the profiler's record of allocations."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
            step.call(step.prepare(0))
        found = recorded.profiler.kineto_results.events() if recorded.profiler else []
        held = most = 0
        for _, size in sorted((e.start_ns(), e.nbytes()) for e in found if e.name() == "[memory]"):
            held += size
            most = max(most, held)
        return most

    def launches(self, step: Step) -> int | None:
        return None

    @property
    def cache_bytes(self) -> int:
        sizes = [_cache_bytes(path) for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
        return max(sizes, default=32 * MIB)


def _cache_bytes(path: Path) -> int:
    text = path.read_text().strip()
    units = {"K": 1 << 10, "M": MIB, "G": 1 << 30}
    return int(text[:-1]) * units[text[-1]] if text[-1:] in units else int(text)


class CudaTimer(Timer):
    HOST_CALLS = 20
    CYCLES_PER_US = 2000  # of _sleep: no GPU's clock is much faster, and on a slower one the sleep is longer
    LONGEST_SLEEP_US = 5000.0

    def __init__(self, device: torch.device, budget_ms: float = 50, least: int = 10, most: int = 100) -> None:
        super().__init__(budget_ms, least, most)
        self.device = device
        self.flushed = torch.empty(max(256 * MIB, 2 * self.cache_bytes) // 4, dtype=torch.int32, device=device)

    def flush(self) -> None:
        """Write more than the cache holds, and read it: what stays is not inputs, nor has it to be written back."""
        self.flushed.zero_()
        self.flushed.max()

    def times(self, step: Step) -> Times:
        busy_us = 2 * self.host_us(step) + 20
        (estimate,) = self._samples(step, 1, busy_us)
        return summarize(self._samples(step, self.repetitions(estimate), busy_us))

    def _samples(self, step: Step, count: int, busy_us: float) -> list[float]:
        starts, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(count)] for _ in range(2))
        torch.cuda.synchronize(self.device)
        for number, (start, end) in enumerate(zip(starts, ends)):
            state = step.prepare(number)
            self.flush()
            torch.cuda._sleep(int(self.CYCLES_PER_US * min(busy_us, self.LONGEST_SLEEP_US)))
            start.record()
            result = step.call(state)
            end.record()
            del state, result
        torch.cuda.synchronize(self.device)
        return [float(start.elapsed_time(end)) for start, end in zip(starts, ends)]

    def host_us(self, step: Step) -> float:
        torch.cuda.synchronize(self.device)
        samples = [_nanoseconds(step, i, time.perf_counter_ns) / 1e3 for i in range(self.HOST_CALLS)]
        torch.cuda.synchronize(self.device)
        return statistics.median(samples)

    def peak_bytes(self, step: Step) -> int | None:
        torch.cuda.synchronize(self.device)
        held = torch.cuda.memory_allocated(self.device)
        state = step.prepare(0)
        torch.cuda.reset_peak_memory_stats(self.device)
        result = step.call(state)
        most = torch.cuda.max_memory_allocated(self.device)
        del state, result
        return most - held

    def launches(self, step: Step) -> int | None:
        """As torch's profiler counts them; None where it records nothing or may not be used."""
        from torch.profiler import ProfilerActivity, profile

        state = step.prepare(0)
        torch.cuda.synchronize(self.device)
        try:
            with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU], acc_events=True) as recorded:
                step.call(state)
                torch.cuda.synchronize(self.device)
        except RuntimeError:
            return None
        kinds = [e.device_type for e in recorded.events() or [] if not getattr(e, "is_user_annotation", False)]
        return kinds.count(torch.autograd.DeviceType.CUDA) or None  # type: ignore[attr-defined]

    @property
    def cache_bytes(self) -> int:
        return int(torch.cuda.get_device_properties(self.device).L2_cache_size)


def timer(device: torch.device) -> Timer:
    """The timer for a device."""
    return CpuTimer() if device.type == "cpu" else CudaTimer(device)
