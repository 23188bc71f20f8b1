"""Two sides, each of several runs: what became slower, beyond a tolerance and beyond the noise between runs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.records import Record
from benchmarks.run import COPY, EAGER, PACK
from benchmarks.tables import digits, size

Key = tuple[str, str, int, str, str]
LEAST = 2  # runs of a side, without which its noise is not known
MUST_AGREE = ("device", "cuda", "driver", "threads")


class NotComparableError(ValueError):
    """The two sides cannot be told apart by time alone, or not at all."""


@dataclass(frozen=True)
class Change:
    """A case in several runs of each side: milliseconds, and the same over eager torch's in the same run."""

    key: Key
    before: Sequence[float]
    after: Sequence[float]
    before_relative: Sequence[float]
    after_relative: Sequence[float]
    tolerance: float

    @property
    def ratio(self) -> float:
        """The median time after over that before."""
        return statistics.median(self.after) / statistics.median(self.before)

    @property
    def verdict(self) -> str:
        """slower, if every run after is slower than every run before, by more than the tolerance; faster likewise; else same.

        It has to hold for the milliseconds, and for the multiple of eager torch's time in the same run, if that was measured: a
        machine that was busier in one of the sides slows down both.
        """
        verdict = _moved(self.before, self.after, self.tolerance)
        if not (self.before_relative and self.after_relative):
            return verdict
        return verdict if verdict == _moved(self.before_relative, self.after_relative, self.tolerance) else "same"

    @property
    def cells(self) -> list[str]:
        """A line of the table."""
        op, dtype, numel, mode, provider = self.key
        times = (f"{digits(min(side), 3)}–{digits(max(side), 3)}" for side in (self.before, self.after))
        return [op, dtype, size(numel), mode, provider, self.verdict, *times, f"{self.ratio:.2f}"]


HEADS = ("op", "dtype", "elements", "mode", "provider", "", "before ms", "after ms", "ratio")


def _moved(before: Sequence[float], after: Sequence[float], tolerance: float) -> str:
    if min(after) > max(before) * (1 + tolerance):
        return "slower"
    return "faster" if max(after) * (1 + tolerance) < min(before) else "same"


@dataclass(frozen=True)
class Comparison:
    """Cases of both sides; how many have too few runs on a side; what the second side alone did not measure, or failed in."""

    changes: list[Change]
    too_few: int
    gone: list[Key]
    broken: list[Record]

    @property
    def regressions(self) -> list[Change]:
        """This package's cases that became slower. The others are a control: theirs is the same code on both sides."""
        return [change for change in self.changes if change.key[-1] == PACK and change.verdict == "slower"]

    @property
    def noise(self) -> float:
        """The median, over cases and sides, of the slowest run over the fastest, less 1."""
        return statistics.median(max(side) / min(side) for c in self.changes for side in (c.before, c.after)) - 1


Runs = Sequence[Sequence[Record]]


def compare(before: Runs, after: Runs, tolerance: float) -> Comparison:
    """Match the cases of two sides; copies and cases that failed before are left out."""
    for field in MUST_AGREE:
        found = [{getattr(record, field) for run in side for record in run} for side in (before, after)]
        if len(found[0] | found[1]) > 1:
            one, other = (", ".join(sorted(map(str, values))) for values in found)
            raise NotComparableError(f"the runs differ in {field}: {one} before, {other} after")
    first, second = _times(before), _times(after)
    both = [key for key in first if key in second]
    enough = [key for key in both if min(len(first[key]), len(second[key])) >= LEAST]
    if not enough:
        raise NotComparableError(
            f"no case has {LEAST} runs on each side, without which noise cannot be told from a change; "
            "measure each side with `run --runs 3`"
        )
    tried = {record.key: record for run in after for record in run}
    return Comparison(
        [
            Change(
                key,
                list(first[key].values()),
                list(second[key].values()),
                _relative(first, key),
                _relative(second, key),
                tolerance,
            )
            for key in enough
        ],
        len(both) - len(enough),
        [key for key in first if key not in tried],
        [tried[key] for key in first if key in tried and key not in second],
    )


def _times(runs: Runs) -> dict[Key, dict[int, float]]:
    """Milliseconds of each case in the runs, by number, that measured it."""
    found: dict[Key, dict[int, float]] = {}
    for number, run in enumerate(runs):
        for record in run:
            if record.ms and record.op != COPY:
                found.setdefault(record.key, {})[number] = record.ms
    return found


def _relative(times: dict[Key, dict[int, float]], key: Key) -> list[float]:
    """A case's times over eager torch's in the same runs; none for eager torch itself."""
    eager = times.get((*key[:-1], EAGER), {}) if key[-1] != EAGER else {}
    return [ms / eager[run] for run, ms in times[key].items() if run in eager]
