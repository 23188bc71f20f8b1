"""The benchmark's timer on a GPU: every field of a record is filled in, and what can be known beforehand is so."""

from __future__ import annotations

import pytest
import torch

import triton_thresh as tt
from benchmarks import records
from benchmarks.records import Record
from benchmarks.run import COMPILE, COPY, EAGER, GRAD, PACK, Bench, measure, plan
from benchmarks.timing import CudaTimer

from .cases import DEVICE

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("providers", [(EAGER, PACK), (COMPILE, GRAD)], ids="+".join)
def test_records_of_a_gpu(providers: tuple[str, ...]) -> None:
    made: list[Record] = []
    timer = CudaTimer(torch.device("cuda", torch.cuda.current_device()), budget_ms=1, least=3, most=3)
    with tt.use_backend("auto"):  # as the benchmark runs
        asked = plan(
            "cuda", ops=["hardshrink", "threshold_mse_loss"], dtypes=["bfloat16"], sizes=[16], providers=providers
        )
        list(measure(asked, Bench(asked.device, timer, records.stamp(DEVICE), made.append)))
        assert len(made) == len(asked)
    for record in made:
        assert record.error is None
        assert record.ms is not None
        assert 0 < record.ms < 10
        assert record.host_us is not None
        assert record.host_us > 0
        assert record.peak_bytes is not None
        assert (record.gbps is None) == (record.bytes == 0)
    (single,) = (r for r in made if r.op == COPY)
    assert single.launches == 1
    assert single.peak_bytes == 2 << 16
    if PACK in providers:
        (forward,) = (r for r in made if (r.op, r.mode, r.provider) == ("hardshrink", "forward", PACK))
        assert forward.launches == 1
        assert forward.peak_bytes == 2 << 16
        assert forward.blocks == "eager"
        (loss,) = (r for r in made if (r.op, r.mode, r.provider) == ("threshold_mse_loss", "forward", PACK))
        assert loss.blocks is not None
        assert "default" in loss.blocks
