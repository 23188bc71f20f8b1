"""Every kernel of the registry, compiled ahead of time for four targets, held to its budget; and what a launch specialises."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton to be compiled")

from benchmarks.aot import TARGETS, Report
from benchmarks.cases import ITEMSIZE, Case, cases
from benchmarks.compiled import compile_case
from benchmarks.roofline import GPUS
from benchmarks.stub_driver import StubDriver
from triton_thresh import gates, losses, tuning
from triton_thresh.bases import BASES, BCEWithLogits
from triton_thresh.cells import specify
from triton_thresh.kernels import foreach, gate, select
from triton_thresh.registry import GATES, Gate
from triton_thresh.rules import RULES, ByPrediction, Unweighted

from .conftest import INTERPRETED

pytestmark = [pytest.mark.skipif(INTERPRETED, reason="this process interprets kernels"), pytest.mark.slow]

# Instructions an H200 issues in the time it moves a byte at 4.3 TB/s, which copies are expected to reach: 7.78.
SLOTS_PER_BYTE = GPUS["H200"].instructions_per_second / 4.3e12


def _violations(case: Case, report: Report) -> list[str]:
    """What of the budget a compiled kernel breaks."""
    found = []
    if report.spills:
        found.append(f"spills {report.spills}")
    size = ITEMSIZE[case.dtype]
    reads, writes = _full_size_operands(case)
    wide_reads = report.per_element(report.hot.load_bits[128] * 16)
    wide_writes = report.per_element(report.hot.store_bits[128] * 16)
    if wide_reads < reads * size:
        found.append(
            f"reads {wide_reads} of {reads * size} bytes an element in 16-byte vectors: {dict(report.hot.load_bits)}"
        )
    if wide_writes < writes * size:
        found.append(f"writes {wide_writes} of {writes * size} bytes an element in 16-byte vectors")
    packed = case.jit in (gate.forward, gate.backward_bit, gate.backward_input, gate.backward_code)
    if packed or (case.jit is foreach.inplace and not case.arguments["kept_ptr"]):
        if report.shared_bytes or report.barriers or report.shuffles:
            found.append(f"uses shared memory ({report.shared_bytes} bytes), barriers or shuffles")
        limit = SLOTS_PER_BYTE * (reads + writes) * size
        limit = max(limit, DIVIDE.get(case.op, 0.0))
        if report.target == "sm_90" and report.hot_instructions_per_element > limit:
            found.append(f"{report.hot_instructions_per_element:.1f} instructions an element, time for {limit:.1f}")
    if case.jit is select.count and report.shared_bytes > 1024:
        found.append(f"uses {report.shared_bytes} bytes of shared memory, expected those of a histogram of 256")
    if report.target == "sm_90" and report.hot_instructions_per_element > INSTRUCTIONS.get(str(case), float("inf")):
        found.append(
            f"{report.hot_instructions_per_element:.1f} instructions an element, expected {INSTRUCTIONS[str(case)]}"
        )
    return found


# Gates that divide: an H200 is bound by instructions where each element has thresholds of its own.
DIVIDE = {"firm": 70.0, "garrote": 36.0}
# With four times the elements a thread these take up to 4 fewer, and up to half as long again: a third of the warps fit.
INSTRUCTIONS = {
    # by products, for targets of 0 and 1, and by logarithms
    "focal.Unweighted-forward-bf16-number": 44.0,
    "focal.Unweighted-forward-hard-bf16-number": 38.0,
    "focal.Unweighted-backward-bf16-number": 61.0,
    "asymmetric.Unweighted-forward-bf16-number": 102.0,
    "asymmetric.Unweighted-forward-hard-bf16-number": 71.0,
    "asymmetric.Unweighted-backward-bf16-number": 99.0,
    "huber.Unweighted-forward-bf16-number": 15.0,
    "epsilon_insensitive.Unweighted-forward-bf16-number": 19.0,
    "quantile.Unweighted-forward-bf16-number": 16.0,
    "hinge.Unweighted-forward-bf16-number": 16.0,
    "bce.ByPrediction-forward-bf16-number": 55.0,
    # A rule adds at most 20.
    "bce_with_logits.Unweighted-forward-bf16-number": 28.0,
    "bce_with_logits.ByPrediction-forward-bf16-number": 32.0,
    "bce_with_logits.ByOutcome-forward-bf16-number": 35.0,
    "bce_with_logits.ByConfidence-forward-bf16-number": 47.0,
    "bce_with_logits.ByProximity-forward-bf16-number": 46.0,
    "bce_with_logits.ByLoss-forward-bf16-number": 32.0,
}


def _full_size_operands(case: Case) -> tuple[int, int]:
    """How many tensors of the input's size and dtype a full tile reads and writes."""
    if case.jit is gate.forward:
        loads = GATES[case.op].operands if case.op in GATES else 1
        wide = case.operands == "element" or (case.operands == "channel" and not case.arguments["BY_COLUMN"])
        return 1 + loads * wide, 1
    if case.jit is gate.backward_bit:
        return 1, 1
    if case.jit is gate.backward_input:
        return 3 if case.operands == "channel" else 2, 1
    if case.jit is gate.backward_code:
        return 1, 2 if case.operands == "element" else 1
    if case.jit is foreach.inplace:
        return 1, 1
    if case.kernel in ("finish", "count", "fired") or case.operands == "odd":
        return 0, 0
    if case.jit in (select.rows, select.count, select.histogram):
        return 1, 0
    if case.kernel in ("rescale", "forward-hard", "forward-options", "descend"):
        return 1, 1
    return 2, 1


DTYPES = {
    "sm_80": ("fp32",),
    "sm_90": ("fp32", "bf16", "fp64"),
    "sm_100": ("bf16",),
    "gfx942": ("bf16",),
}
WHOLE = ("sm_90", "bf16")
AGAIN = ("sm_90", "fp32")  # a target and a dtype that others have
# Each base alone, each rule once, and BCE as the budget has it.
ALONE = {f"{base.snake_name()}.{Unweighted.__name__}" for base in BASES}
PAIRS = {*ALONE, "bce.ByPrediction", *(f"bce_with_logits.{rule.__name__}" for rule in RULES)}
ELSEWHERE = {
    "bce_with_logits.ByPrediction",
    "asymmetric.Unweighted",
}  # the targets differ in little: the plain loss, the largest


ALL_FORMS = ("hardshrink", "bce_with_logits.ByPrediction")
EVERYWHERE = {
    ("hardshrink", "forward1"),
    ("jumprelu", "learned-forward2"),
    ("jumprelu", "learned-backward"),
    ("asymmetric.Unweighted", "forward"),
    ("kth_largest", "rows"),
}


def _is_kept(target: str, case: Case) -> bool:
    """Whether a kernel is compiled here: of pairs all in bf16 on sm_90, but for the second forms of plain bases.

    Selections and the linear loss are compiled for two targets; in float64 the row that fills the registers.
    """
    if case.op in ("kth_largest", "histogram", "linear_threshold_loss"):
        return target in ("sm_90", "gfx942") and (case.dtype == "bf16" or (case.dtype, case.kernel) == ("fp64", "rows"))
    if "." not in case.op:
        return True
    if (target, case.dtype) != WHOLE:
        return case.op in ELSEWHERE
    return case.op in PAIRS and (case.op not in ALONE or str(case) in INSTRUCTIONS or case.kernel == "forward")


def _all_cases() -> list[object]:
    """Each kernel in bf16 on sm_90, for one gate in every form, for the losses with each base and each rule once.

    Other targets and dtypes differ in what the backends make of a kernel: there a tensor per channel is compiled where the
    kernel takes one, and `make test` compiles a gate, a learned gate, the largest loss and a selection. `make matrix`
    compiles the other forms that this lists, `python -m benchmarks compile` all there are.
    """
    found: dict[str, object] = {}
    for target, gpu in TARGETS.items():
        listed = [case for case in cases(DTYPES[target], gpu.warp_size) if _is_kept(target, case)]
        kinds: dict[object, set[str]] = {}
        for case in listed:
            kinds.setdefault((case.op, case.kernel, case.dtype), set()).add(case.operands)
        for case in listed:
            whole = (target, case.dtype) == WHOLE
            plain = case.operands not in ("channel-odd", "rows", "odd") and case.kernel not in (
                "forward0",
                "forward-none",
            )
            narrow = plain and (case.operands == "channel" or "channel" not in kinds[case.op, case.kernel, case.dtype])
            if not (whole or narrow):
                continue
            form = f"{target} {case.jit.fn.__module__} {case.jit.fn.__qualname__} {case.arguments} {case.num_warps}"
            elsewhere = (case.op, case.kernel) in EVERYWHERE and (target, case.dtype) != AGAIN
            first = case.op in ALL_FORMS or narrow if whole else elsewhere
            marks = [] if first else [pytest.mark.matrix]
            found.setdefault(form, pytest.param(target, case, id=f"{target}-{case}", marks=marks))
    return list(found.values())


@pytest.mark.parametrize(("target", "case"), _all_cases())
def test_budget(target: str, case: Case) -> None:
    report = compile_case(case, target)
    assert not _violations(case, report), report


def test_a_scalar_load_is_noticed() -> None:
    """Tiles half as large leave each thread 8 bytes a load: the budget must say so."""
    case = next(case for case in cases(("fp32",)) if str(case) == "hardshrink-forward1-fp32-number")
    narrow = dataclasses.replace(case, arguments={**case.arguments, "COLS": 128}, elements=8 * 128)
    report = compile_case(narrow, "sm_90")
    assert any("16-byte vectors" in violation for violation in _violations(narrow, report))


def test_a_spill_is_noticed() -> None:
    """A tile eight times as large for the same threads does not fit in their registers: the budget must say so."""
    case = next(case for case in cases(("fp32",)) if str(case) == "hardshrink-forward1-fp32-number")
    large = dataclasses.replace(case, arguments={**case.arguments, "COLS": 4096}, elements=8 * 4096)
    assert any(violation.startswith("spills") for violation in _violations(large, compile_case(large, "sm_90")))


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StubDriver]:
    monkeypatch.setattr(tuning, "device_name", lambda device: "stub")
    monkeypatch.setattr(tuning, "lanes", lambda device: 32)
    monkeypatch.setenv("TRITON_THRESH_AUTOTUNE", "0")
    tuning._settled.clear()
    driver = StubDriver()
    with driver:
        yield driver
    tuning._settled.clear()


def _variant(row: Gate, learns: bool) -> gates.Variant:
    return gates._variant(row, torch.float32, True, learns, False)


FIXED = [row for row in GATES.values() if not row.straight_through]
LEARNED = [row for row in GATES.values() if row.straight_through]


@pytest.mark.parametrize("row", FIXED, ids=lambda row: str(row.name))
def test_gate_numbers_are_not_specialised(stub: StubDriver, row: Gate) -> None:
    x = torch.randn(1)
    for value in (0.5, 1.0, 0.0, 16.0):
        gates.forward(x, value, (value,) * (len(row.example) - 1), _variant(row, False))
    assert all(made.signature == stub.launches[0].signature for made in stub.launches)
    assert all(made.specialised <= {"groups"} for made in stub.launches)


@pytest.mark.parametrize("row", LEARNED, ids=lambda row: str(row.name))
def test_numbers_of_learned_gates_are_not_specialised(stub: StubDriver, row: Gate) -> None:
    """Only sizes are, where 16 divides them."""
    sizes = {"width", "features", "operands[0][1]", "operands[0][2]"}
    for value, shape in ((0.5, (64, 48)), (1.0, (64, 32)), (16.0, (400, 47)), (1.0, (1, 1))):
        x, t = torch.randn(shape), torch.zeros(shape[1:])
        variant = _variant(row, True)
        _, _, bits, bit_layout = gates.forward(x, t, (value,), variant)
        assert bits is not None
        gradients = [x, *([x[:, 0]] if row.counts else [])]
        gates._backward_code(variant, (t, value), bits, bit_layout, gradients, t.shape)
    assert all(made.specialised <= sizes for made in stub.launches)
    assert {made.kernel for made in stub.launches} == {"forward", "backward_code"} | (
        {"count"} if row.counts else set()
    )


@pytest.mark.parametrize("value", [0.25, 1.0])
def test_loss_numbers_are_not_specialised(stub: StubDriver, value: float) -> None:
    x = torch.randn(1)
    options = {"weight": value, "label_smoothing": value, "divisor": value}
    parts = BCEWithLogits(value), ByPrediction(value, value, value)
    spec, operands = specify(*parts, options, True, "mean", torch.float32)
    losses.loss_forward(spec, x, x, operands, want_gradient=True)
    assert not any(made.specialised for made in stub.launches)
