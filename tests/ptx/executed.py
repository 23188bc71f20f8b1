"""The instructions of PTX that a launch executes an element, its loops as often as they run.

    python -m tests.ptx.executed        writes benchmarks/results/ptx/executed.json

The compile report counts machine code, which this does not see, along the path of a full tile; of loops it repeats that over a
program's tiles alone. Here every pass counts, and so do prologue, reduction, and the kernels that follow. PTX has moves that
machine code does not, and the other way round: the two counts are compared with themselves, not with each other.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import triton_thresh as tt
from triton_thresh import thresholds, tuning

from ..gates import GATES
from ..losses import PAIRS, setup
from .driver import PtxDriver, on_ptx

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "ptx" / "executed.json"
COUNT = 1 << 15  # whole tiles of every kernel
SHAPE = (16, COUNT // 16)


def calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """Gates and losses with their backward, and selection, in bfloat16."""
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).bfloat16()

    def stepped(op: Callable[[torch.Tensor], torch.Tensor]) -> None:
        y = op(x.clone().requires_grad_())
        if y.requires_grad:
            y.sum().backward()  # type: ignore[no-untyped-call]

    for op in GATES:
        yield op.name, lambda op=op: stepped(lambda x: op(x, *op.example))  # type: ignore[misc]
    for cell in PAIRS:
        made = setup(cell, torch.bfloat16, torch.device("cpu"), shape=SHAPE)
        yield str(cell), lambda made=made: made("mean", made.input.requires_grad_()).backward()  # type: ignore[misc]
    yield "kth_largest", lambda: thresholds.kth_largest(x, COUNT // 8)
    yield "kth_largest by row", lambda: thresholds.kth_largest(x, COUNT // 128, by_row=True)
    yield "otsu_threshold", lambda: tt.otsu_threshold(x)


def measured(driver: PtxDriver, call: Callable[[], object]) -> dict[str, float]:
    """By kernel: instructions of all threads over the elements of the call."""
    driver.executed.clear()
    call()
    return {kernel: round(count / COUNT, 2) for kernel, count in driver.executed.items()}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, on_ptx(PtxDriver(90, Path(folder)), tuning.default) as driver:
        found = {name: measured(driver, call) for name, call in calls()}
    RESULT.write_text("{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in found.items()) + "\n}\n")


if __name__ == "__main__":
    main()
