"""Two result files against each other: what became slower, beyond a tolerance and beyond the noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.records import Record
from benchmarks.run import COPY


@dataclass(frozen=True)
class Change:
    """One case in both files."""

    before: Record
    after: Record
    tolerance: float

    @property
    def ratio(self) -> float:
        """Time after over time before."""
        assert self.before.ms
        assert self.after.ms
        return self.after.ms / self.before.ms

    @property
    def verdict(self) -> str:
        """slower or faster if the median moved by more than the tolerance and the 20-80 % ranges do not overlap, else same."""
        before, after = self.before, self.after
        assert before.ms_p20 is not None
        assert before.ms_p80 is not None
        assert after.ms_p20 is not None
        assert after.ms_p80 is not None
        if self.ratio > 1 + self.tolerance and after.ms_p20 > before.ms_p80:
            return "slower"
        if self.ratio < 1 / (1 + self.tolerance) and after.ms_p80 < before.ms_p20:
            return "faster"
        return "same"


@dataclass(frozen=True)
class Comparison:
    """What both files hold, what only the first measured, and what failed in the second alone."""

    changes: list[Change]
    gone: list[Record]
    broken: list[Record]

    @property
    def regressions(self) -> list[Change]:
        return [change for change in self.changes if change.verdict == "slower"]

    @property
    def passes(self) -> bool:
        return not self.regressions and not self.broken


def compare(before: Sequence[Record], after: Sequence[Record], tolerance: float) -> Comparison:
    """Match the cases of two files; copies and cases that failed before are left out."""
    later = {record.key: record for record in after}
    measured = [record for record in before if record.ms and record.op != COPY]
    pairs = [(record, later[record.key]) for record in measured if record.key in later]
    return Comparison(
        [Change(one, other, tolerance) for one, other in pairs if other.ms],
        [record for record in measured if record.key not in later],
        [other for _, other in pairs if not other.ms],
    )
