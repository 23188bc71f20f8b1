"""The benchmark tool: every op has a workload that is checked; records, statistics, comparison, report, steps of a GPU run."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib", reason="the benchmark draws")
pytest.importorskip("rich", reason="the benchmark shows its progress")

from benchmarks import gpu, linear, plots, records, report, roofline, selection, tables, traffic, workloads
from benchmarks.__main__ import main
from benchmarks.compare import NotComparableError, compare
from benchmarks.records import MixedRecordsError, Record, Stamp, Writer
from benchmarks.run import COMPILE, COPY, EAGER, GRAD, ONE_PASS, PACK, PROVIDERS, Bench, Plan, measure, plan
from benchmarks.timing import CpuTimer, CudaTimer, Step, summarize
from benchmarks.workloads import Inputs, Workload, WrongResultError
from triton_thresh import cli, tune
from triton_thresh.registry import OPS, Loss

from .conftest import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="once is enough, and the benchmark measures what users run")

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
FIXTURE = Path(__file__).parent / "data" / "benchmark.jsonl"
STAMP = Stamp("NVIDIA H200", "570.1", "12.8", "2.11.0", "3.6.0", "abc1234")


def some_record(**fields: Any) -> Record:
    values: dict[str, Any] = dict(
        op="hardshrink", dtype="float32", numel=1024, mode="forward", provider=PACK, ms=1.0, ms_p20=0.95, ms_p80=1.05,
        bytes=8192, gbps=1.0, copy_fraction=0.5, peak_bytes=4096, host_us=5.0, launches=1, **dataclasses.asdict(STAMP),
        timestamp="2026-01-02T03:04:05+00:00",
    )  # fmt: skip
    return Record(**{**values, **fields})


# ----------------------------------------------------------------------------------------------------------- workloads


def all_workloads(dtype: torch.dtype, numel: int) -> list[Workload]:
    return [w for op in OPS.values() for w in workloads.workloads(op, dtype, numel, CPU)]


def workload_of(name: str, dtype: torch.dtype = torch.float32, numel: int = 1 << 16) -> Workload:
    (found,) = workloads.workloads(OPS[name], dtype, numel, CPU)
    return found


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numel", [1, 1000])
def test_every_op_has_a_workload_whose_check_passes(name: str, dtype: torch.dtype, numel: int) -> None:
    found = list(workloads.workloads(OPS[name], dtype, numel, CPU))
    assert found
    for workload in found:
        for mode in workload.modes:
            workloads.check(workload, workload.pack, mode, strict=True)
            workloads.check(workload, workload.eager, mode, strict=False)
            assert workload.bytes[mode] >= 0
        assert max(workload.bytes[mode] for mode in workload.modes) > 0
        assert workload.blocks(workload.make(0), "forward") == "eager"


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("strict", [True, False])
def test_a_spoiled_result_fails_the_check(name: str, strict: bool) -> None:
    for workload in workloads.workloads(OPS[name], torch.float32, 1000, CPU):
        for mode in workload.modes:
            with pytest.raises(WrongResultError, match="output"):
                workloads.check(workload, _spoiled(workload.pack, 1.1, 0.01), mode, strict=strict)
            if mode != "forward":
                with pytest.raises(WrongResultError, match="gradient"):
                    workloads.check(workload, _wrong_gradient(workload.pack), mode, strict=strict)


def _spoiled(call: Callable[..., Any], factor: float, term: float) -> Callable[..., Any]:
    return lambda *tensors: tuple(y * factor + term for y in workloads.outputs(call(*tensors)))


def _wrong_gradient(call: Callable[..., Any]) -> Callable[..., Any]:
    """The same outputs, twice the gradient."""
    return lambda *tensors: tuple(2 * y - y.detach() for y in workloads.outputs(call(*tensors)))


def test_names_are_unique_and_keep_to_the_registry() -> None:
    names = [workload.name for workload in all_workloads(torch.float32, 1)]
    assert len(set(names)) == len(names)
    assert {name.partition(".")[0] for name in names} == set(OPS)


@pytest.mark.parametrize("case", linear.CASES)
def test_the_linear_loss_is_measured_beside_its_formula(case: str) -> None:
    tensors, labels = linear._made(16, 8, 100, 3, CPU)
    losses = [call(case, *tensors, labels) for call in (linear.written, linear.ours)]
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(*[torch.autograd.grad(loss, tensors) for loss in losses])


def test_measures_of_the_linear_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes are not started here, and the peak of this one is another's."""
    monkeypatch.setattr(linear, "_begin", lambda device: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    stamped = dict(device="cpu", torch="2.13.0", commit="abc1234", timestamp=records.now())
    made = [
        linear.LinearRecord(**linear.measure("focal", (8, 4, 50, 2), provider, 1, 1, CPU), **stamped)
        for provider in (linear.WRITTEN, linear.PACK)
    ]
    assert made[0].gradient_bytes == 4 * (8 * 4 + 50 * 4 + 50)
    *_, written, pack = linear.table([dataclasses.replace(record, extra_bytes=2**20) for record in made])
    assert written.startswith("| focal | 50 | 1 | written out |")
    assert pack.endswith(f"| {made[1].ms / made[0].ms:.2f} | {made[1].cpu_ms / made[0].cpu_ms:.2f} | 1.00 |")
    assert "it chunks nothing" in linear.table([dataclasses.replace(made[0], chunked=0)])[-1]


@pytest.mark.parametrize("n", [256, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selections_are_measured_beside_their_like(dtype: torch.dtype, n: int) -> None:
    x = torch.randperm(n, generator=torch.Generator().manual_seed(0)).to(dtype) - n / 2
    found = list(selection.cases(n))
    assert len(found) == (6 if n == 4096 else 4)
    for case, _, rows, call, other in found:
        own = x.view(-1, selection.WIDTH) if rows else x
        if "batch" not in case or dtype is torch.float32:  # ties at the bound are kept
            torch.testing.assert_close(call(own), other(own).to(dtype), rtol=0, atol=0, msg=case)


# ------------------------------------------------------------------------------------------------------------ statistics


def test_quantiles() -> None:
    assert summarize([3.0]) == (3.0, 3.0, 3.0)
    assert summarize([5.0, 1.0, 2.0, 3.0, 4.0, 0.0]) == (2.5, 1.0, 4.0)


class Clock:
    """Moves on by so much in each call that is timed."""

    def __init__(self, *milliseconds: float) -> None:
        self.now, self.left, self.open = 0, list(milliseconds), False

    def __call__(self) -> int:
        if self.open:
            self.now += int(1e6 * (self.left.pop(0) if len(self.left) > 1 else self.left[0]))
        self.open = not self.open
        return self.now


def test_only_the_call_is_timed_on_rotating_states() -> None:
    prepared: list[int] = []
    called: list[int] = []

    def prepare(number: int) -> int:
        prepared.append(number)
        return number

    timer = CpuTimer(budget_ms=4, least=2, most=100, clock=Clock(1.0, 1.0, 1.0, 2.0, 3.0, 4.0))
    times = timer.times(Step(prepare, called.append))
    assert times == summarize([1.0, 2.0, 3.0, 4.0]), "two calls for the estimate, then as many as the budget holds"
    assert prepared == called == [0, 1, 0, 1, 2, 3]


@pytest.mark.parametrize(("ms", "count"), [(0.0, 50), (0.5, 50), (5.0, 20), (1000.0, 3)])
def test_repetitions(ms: float, count: int) -> None:
    assert CpuTimer(budget_ms=100, least=3, most=50).repetitions(ms) == count


def test_peak_memory_on_a_cpu() -> None:
    x = torch.randn(1 << 16)
    call = Step(lambda _: x, lambda x: (x + 1) * 2)
    assert CpuTimer().peak_bytes(call) == pytest.approx(2 * 4 << 16, abs=1000), "the sum, and its double"


class Events:
    """torch.cuda as far as CudaTimer uses it, on CPU tensors: what is called, in order; an event's time is its number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[str] = []
        events, log = iter(range(10**6)), self.seen

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                log.append("event")
                self.time = next(events)

            def elapsed_time(self, end: Any) -> float:
                return float(end.time - self.time)

        class Properties:
            L2_cache_size = 1 << 10

        for name, value in dict(
            Event=Event,
            synchronize=lambda device: log.append("wait"),
            _sleep=lambda cycles: log.append("sleep"),
            get_device_properties=lambda device: Properties,
            memory_allocated=lambda device: 100,
            max_memory_allocated=lambda device: 350,
            reset_peak_memory_stats=lambda device: log.append("reset"),
        ).items():
            monkeypatch.setattr(torch.cuda, name, value)


def test_on_a_gpu_the_cache_is_flushed_and_the_host_ahead_before_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Events(monkeypatch).seen
    timer = CudaTimer(CPU, budget_ms=3, least=2, most=3)
    monkeypatch.setattr(timer, "flush", lambda: seen.append("flush"))
    step = Step(lambda number: seen.append("prepare"), lambda _: seen.append("call"))
    assert timer.times(step) == (1.0, 1.0, 1.0)
    timed = ["prepare", "flush", "sleep", "event", "call", "event"]
    host = ["wait", *["prepare", "call"] * CudaTimer.HOST_CALLS, "wait"]
    assert seen == [*host, "wait", *timed, "wait", "wait", *timed * 3, "wait"]
    seen.clear()
    assert timer.peak_bytes(step) == 250
    assert seen == ["wait", "prepare", "reset", "call"]


def test_the_flush_writes_and_reads_more_than_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    Events(monkeypatch)
    timer = CudaTimer(CPU)
    assert timer.flushed.numel() * 4 >= 256 << 20 > timer.cache_bytes
    timer.flushed = torch.ones(4, dtype=torch.int32)
    timer.flush()
    assert not timer.flushed.any()


# -------------------------------------------------------------------------------------------------------------- records


def test_what_is_written_is_read(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "a" / "b.jsonl", STAMP)
    kept = [some_record(), some_record(op="softshrink", ms=None, ms_p20=None, ms_p80=None, gbps=None, error="broke")]
    for record in kept:
        writer.write(record)
    assert records.read(writer.path) == kept
    assert list(json.loads(writer.path.read_text().splitlines()[0]))[:21] == [
        "op", "dtype", "numel", "mode", "provider", "ms", "ms_p20", "ms_p80", "bytes", "gbps", "copy_fraction", "peak_bytes",
        "host_us", "launches", "device", "driver", "cuda", "torch", "triton", "commit", "timestamp",
    ]  # fmt: skip


def test_of_a_case_measured_twice_the_later_counts(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "a.jsonl", STAMP)
    for ms in (1.0, 2.0):
        writer.write(some_record(ms=ms))
    (record,) = records.read(writer.path)
    assert record.ms == 2.0


@pytest.mark.parametrize("field", ["device", "driver", "cuda", "torch", "triton", "commit", "threads"])
def test_records_never_mix(field: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    Writer(path, STAMP).write(some_record())
    other = dataclasses.replace(STAMP, **{field: 3 if field == "threads" else "0000000"})
    with pytest.raises(MixedRecordsError, match=f"of another run .{field}: "):
        Writer(path, other, resume=True)
    with pytest.raises(MixedRecordsError, match=field):
        Writer(path, STAMP, resume=True).write(some_record(**dataclasses.asdict(other)))
    path.write_text(path.read_text() + json.dumps(dataclasses.asdict(some_record(**dataclasses.asdict(other)))))
    with pytest.raises(MixedRecordsError, match=f"a.jsonl mixes records that differ in {field}"):
        records.read(path)


def test_a_run_is_a_file(tmp_path: Path) -> None:
    paths = []
    for _ in range(2):
        writer = Writer.in_folder(tmp_path, STAMP)
        writer.write(some_record())
        paths.append(writer.path)
    assert [path.stem.partition(STAMP.commit)[2] for path in paths] == ["", "-2"]
    assert paths[0].parent.name == "NVIDIA_H200"
    with pytest.raises(MixedRecordsError, match="of another run; name another file"):
        Writer(paths[0], STAMP)
    assert Writer(paths[0], STAMP, resume=True).held == [some_record()]


def test_the_newest_file_of_each_device(tmp_path: Path) -> None:
    for device, day in (("NVIDIA H200", "2026-01-02"), ("NVIDIA H200", "2026-01-01"), ("NVIDIA H100", "2025-01-01")):
        writer = Writer.in_folder(tmp_path, dataclasses.replace(STAMP, device=device))
        writer.write(some_record(device=device, timestamp=f"{day}T00:00:00"))
    (tmp_path / "calls" / "NVIDIA_H200").mkdir(parents=True)
    (tmp_path / "calls" / "NVIDIA_H200" / "other.jsonl").write_text("{}")
    assert len(records.files(tmp_path)) == 3
    assert len(records.files(tmp_path / "NVIDIA_H200")) == 2
    found = [records.read(path)[0] for path in records.newest(tmp_path)]
    assert [(record.device, record.timestamp[:4]) for record in found] == [
        ("NVIDIA H100", "2025"),
        ("NVIDIA H200", "2026"),
    ]


def test_what_is_no_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"op": "hardshrink"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: not a record"):
        records.read(tmp_path / "a.jsonl")


def test_commits(tmp_path: Path) -> None:
    assert records.commit(tmp_path) == "unknown"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "code").write_text("1")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    clean = records.commit(tmp_path)
    assert "-" not in clean
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "new.jsonl").write_text("")
    assert records.commit(tmp_path) == clean, "results are not code"
    (tmp_path / "more").write_text("2")
    assert records.commit(tmp_path) == f"{clean}-dirty"


# ------------------------------------------------------------------------------------------------------------------ run


def tiny(**fields: Any) -> Plan:
    return dataclasses.replace(
        plan("cpu", ops=["hardshrink"], dtypes=["float32"], sizes=[4], providers=[EAGER, PACK]), **fields
    )


@pytest.fixture
def written() -> list[Record]:
    return []


@pytest.fixture
def bench(written: list[Record]) -> Bench:
    return Bench(CPU, CpuTimer(budget_ms=0.1, least=2, most=2), records.stamp(CPU), written.append)


def test_a_run_records_every_case(bench: Bench, written: list[Record]) -> None:
    asked = tiny()
    assert list(measure(asked, bench)) == written
    assert len(written) == len(asked) == 5
    assert [record.provider for record in written] == [COPY, *[EAGER, PACK] * 2]
    for record in written:
        assert record.error is None
        assert record.ms is not None
        assert record.ms > 0
        assert record.copy_fraction is not None
        assert record.gbps == pytest.approx(record.bytes / record.ms / 1e6, rel=1e-3)
        assert record.cuda is record.host_us is record.launches is None
    assert written[0].copy_fraction == 1
    assert written[-1].blocks == "eager"


def test_what_is_done_is_not_done_again(bench: Bench, written: list[Record]) -> None:
    list(measure(tiny(), bench))
    done = frozenset(record.key for record in written[:3])
    written.clear()
    list(measure(tiny(), bench, done))
    assert len(written) == 3, "the copy again, since shares are of the same run's"


def test_a_deadline_ends_a_run(bench: Bench, written: list[Record]) -> None:
    assert list(measure(tiny(), bench, deadline=-math.inf)) == []


def test_a_wrong_result_is_recorded_and_the_run_goes_on(
    bench: Bench, written: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workloads, "function_of", lambda op: lambda x, lambd: x * 1.5)
    list(measure(tiny(modes=("forward",)), bench))
    assert [record.error is None for record in written] == [True, True, False]
    assert written[-1].error is not None
    assert written[-1].error.startswith("WrongResultError: output 0")
    assert written[-1].ms is None


def test_inputs_that_do_not_fit_are_recorded(
    bench: Bench, written: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    def sets(make: Callable[[int], Inputs]) -> list[Inputs]:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(bench, "sets", sets)
    list(measure(tiny(), bench))
    assert {record.error for record in written} == {"OutOfMemoryError: no room"}
    assert len(written) == 5


def test_inputs_rotate_where_they_fit_in_the_cache(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuTimer, "cache_bytes", 1000)
    counts = [len(bench.sets(lambda seed, n=n: Inputs((torch.zeros(n),)))) for n in (1, 100, 1000)]  # type: ignore[misc]
    assert counts == [8, 5, 1]


def test_the_full_plan_holds_every_size_and_provider() -> None:
    full = plan("cpu", full=True)
    assert sorted(full.sizes) == list(range(31))
    assert full.providers == PROVIDERS
    assert full.dtypes == ("float32", "bfloat16", "float16")
    assert full.ops == tuple(OPS)


def test_both_compiled_columns_are_measured_unless_asked_otherwise() -> None:
    by_default = plan("cpu")
    assert min(by_default.sizes) == 8, "a call of 256 elements is what small models make"
    cases = {name: by_default.cases(workload_of(name)) for name in ("threshold_mse_loss", "hardshrink")}
    assert cases["threshold_mse_loss"] == [
        *[("forward", provider) for provider in (EAGER, COMPILE, PACK, ONE_PASS)],
        *[("both", provider) for provider in (EAGER, COMPILE, GRAD, PACK, ONE_PASS)],
    ]
    assert ("both", COMPILE) in cases["hardshrink"]
    assert ("both", GRAD) not in cases["hardshrink"], "its upstream gradient comes after its forward pass"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", [name for name, op in OPS.items() if isinstance(op, Loss)])
def test_gradient_and_value_in_one_call_are_the_losss(name: str, dtype: torch.dtype) -> None:
    for workload in workloads.workloads(OPS[name], dtype, 1000, CPU):
        assert workload.whole is not None
        workloads.check(workload, workload.whole, workloads.WHOLE, strict=False)


@pytest.mark.slow
def test_compiled_providers_are_checked_and_recorded(
    bench: Bench, written: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.run.compiled", lambda call: call)
    list(measure(tiny(ops=("threshold_mse_loss",), modes=("both",), providers=PROVIDERS), bench))
    assert [(record.provider, record.error) for record in written] == [(name, None) for name in (COPY, *PROVIDERS)]


@pytest.mark.slow
def test_the_command_line_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    chosen = ["--device", "cpu", "--ops", "hardshrink", "--ops", "exceedance_mse_loss", "--sizes", "3,5", "--providers"]
    assert main(["run", *chosen, "eager,triton_thresh", "--runs", "2", "--out", str(tmp_path)]) == 0
    torch.set_num_threads(threads)
    said = capsys.readouterr().out
    assert "not GPU numbers" in said
    first, second = sorted(tmp_path.rglob("*.jsonl"))
    assert len(records.read(first)) == len(records.read(second)) == 2 * (1 + 2 * 4)
    folder = first.with_suffix("")
    assert "say nothing about a GPU" in (folder / "report.md").read_text()
    assert {p.suffix for p in folder.iterdir()} == {".md", ".png", ".svg"}
    both = f"{first},{second}"
    assert main(["compare", both, str(tmp_path)]) == 0
    assert main(["compare", str(first), both]) == 2, "one run a side"
    assert main(["report", str(first)]) == 0


@pytest.mark.parametrize("command", ["run", "report", "calls", "compile", "bytes"])
def test_results_are_committed_only_if_asked(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    ignored = subprocess.run(["git", "-C", str(ROOT), "check-ignore", "-q", f"{records.LOCAL}/any"], check=False)
    assert ignored.returncode == 0
    assert main([command, "--help"]) == 0
    assert "--commit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--sizes", "abc"], "--sizes: 'abc' is not known; expected exponents of 2"),
        (["run", "--ops", "hardshrnk"], "'hardshrnk' is not known; expected one of hardshrink"),
        (["run", "--dtypes", "float8"], "'float8' is not known"),
        (["run", "--modes", "forward,sideways"], "'sideways' is not known"),
        (["run", "--providers", "jax"], "expected one of eager, torch.compile, torch.compile+grad, triton_thresh"),
        (["run", "--runs", "0"], "--runs"),
        (["run", "--limit", "-1"], "--limit"),
        (["run", "--resume", "/nowhere.jsonl"], "--resume"),
        (["check", "--device", "gpu"], "--device"),
        (["compare", "/nowhere", "/nowhere"], "/nowhere"),
        (["report", "pyproject.toml"], "pyproject.toml, line 1: not a record"),
        (["compile", "--targets", "sm_1"], "'sm_1' is not known; expected one of sm_100"),
        (["measure"], "No such command 'measure'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_typed_wrongly_is_said_in_a_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(arguments) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert said in error
    assert "Traceback" not in error


def test_cuda_asked_for_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["run", "--device", "cuda"]) == 2
    assert capsys.readouterr().err == "Error: --device cuda: torch finds no GPU\n"


# -------------------------------------------------------------------------------------------------------------- compare


def runs(*ms: float, eager: float | None = None, **fields: Any) -> list[list[Record]]:
    """A run for each time, and beside it eager torch's."""
    beside = [some_record(provider=EAGER, ms=eager, **fields)] if eager else []
    return [[some_record(ms=each, **fields), *beside] for each in ms]


@pytest.mark.parametrize(
    ("after", "verdict"),
    [
        ((1.3, 1.2, 1.25), "slower"),
        ((1.3, 1.2, 1.1), "same"),
        ((1.14, 1.15), "same"),
        ((0.8, 0.7), "faster"),
        ((0.8, 1.0), "same"),
    ],
    ids=["beyond", "one run within the noise", "within the tolerance", "better", "one run as before"],
)
def test_verdicts(after: tuple[float, ...], verdict: str) -> None:
    result = compare(runs(1.0, 1.1, 0.95), runs(*after), 0.05)
    (change,) = result.changes
    assert change.verdict == verdict
    assert bool(result.regressions) == (verdict == "slower")


def test_a_machine_that_was_busier_makes_nothing_slower() -> None:
    """Eager torch took as much longer; and its own case is a control, which no exit code depends on."""
    result = compare(runs(1.0, 1.1, eager=2.0), runs(1.6, 1.7, eager=3.2), 0.05)
    assert {change.key[-1]: change.verdict for change in result.changes} == {PACK: "same", EAGER: "slower"}
    assert result.regressions == []
    slower = compare(runs(1.0, 1.1, eager=2.0), runs(1.6, 1.7, eager=2.1), 0.05)
    assert [change.key[-1] for change in slower.regressions] == [PACK]


@pytest.mark.parametrize("field", ["device", "cuda", "driver", "threads"])
def test_different_devices_are_not_compared(field: str) -> None:
    other = 3 if field == "threads" else "another"
    with pytest.raises(NotComparableError, match=f"differ in {field}: .* before, {other} after"):
        compare(runs(1.0, 1.0), runs(1.0, 1.0, **{field: other}), 0.05)


def test_one_run_says_nothing_of_noise() -> None:
    with pytest.raises(NotComparableError, match=r"no case has 2 runs on each side.*--runs 3"):
        compare(runs(1.0), runs(2.0, 2.0), 0.05)


def test_only_matching_cases_are_compared() -> None:
    before = [some_record(), some_record(numel=8), some_record(numel=16), some_record(op=COPY, provider=COPY)]
    after = [some_record(ms=None, error="broke"), some_record(numel=16), some_record(numel=32)]
    result = compare([before, before], [after, after], 0.05)
    assert [change.key for change in result.changes] == [before[2].key]
    assert result.gone == [before[1].key]
    assert result.broken == [after[0]]


def test_compare_names_regressions_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, ms in (("a", 1.0), ("b", 2.0)):
        for run in runs(ms, ms):
            Writer.in_folder(tmp_path / name, STAMP).write(run[0])
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    said = capsys.readouterr().out
    assert "hardshrink" in said
    assert "2.00" in said
    assert main(["compare", str(tmp_path / "b"), str(tmp_path / "a")]) == 0


# --------------------------------------------------------------------------------------------------------------- report


@pytest.mark.slow
def test_report_of_a_gpus_records(tmp_path: Path) -> None:
    """The committed fixture has made-up times; what is tested is what becomes of them."""
    found = records.read(FIXTURE)
    made = report.write(found, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "GPU." not in text, "no warning of CPU figures"
    heads = "op | dtype | elements | eager ms | compile ms | this ms | eager / this | compile / this | % of copy"
    line = ["hardshrink", "float32", "2²⁰", "0.03", "0.02", "0.01", "3", "2", "84", "0.009–0.011", "840"]
    assert f"| {heads} |" in text, "no column for what was not measured"
    assert f"| {' | '.join(line)} |" in text
    assert "| `hardshrink` | bfloat16 | 2²⁰ | forward | torch.compile | OutOfMemoryError: made up |" in text
    pictures = {path.name for path in made if path.suffix == ".png"}
    assert pictures == {"speedup.png", "speedup-small.png", "share-of-copy.png", "memory.png"}
    assert all(path.stat().st_size > 1000 for path in made if path.suffix in (".png", ".svg"))
    again = report.write(found, tmp_path / "again")
    assert [p.read_bytes() for p in made if p.suffix == ".svg"] == [p.read_bytes() for p in again if p.suffix == ".svg"]


def test_pictures_are_1400_pixels_wide_with_text_of_30() -> None:
    assert plots.WIDTH * plots.DPI == 1400
    assert plots.FONT * plots.DPI / 72 > 30, "8 pixels where a page shows the picture 400 pixels wide"


@pytest.mark.parametrize(("value", "text"), [(0.01234, "0.012"), (158.94, "160"), (1.0, "1"), (None, "–")])
def test_two_digits(value: float | None, text: str) -> None:
    assert tables.digits(value) == text


@pytest.mark.parametrize(("numel", "text"), [(1, "2⁰"), (1 << 26, "2²⁶"), (1000, "1,000")])
def test_sizes(numel: int, text: str) -> None:
    assert tables.size(numel) == text


# ------------------------------------------------------------------------------------------------------------- compiled


def test_roofline_times_and_bound() -> None:
    h200 = roofline.GPUS["H200"]
    assert h200.instructions_per_second == pytest.approx(33.45e12, rel=1e-3)
    light = roofline.Point("a", "gate", "bf16", instructions=8, special_functions=0, bytes=4.125)
    heavy = dataclasses.replace(light, instructions=63, bytes=6)
    special = dataclasses.replace(light, special_functions=10)
    assert [point.bound(h200) for point in (light, heavy, special)] == ["bytes", "issue", "special functions"]
    assert light.picoseconds(h200)["bytes"] == pytest.approx(4.125 / 4.8)


def test_committed_compile_report_is_whole() -> None:
    pytest.importorskip("triton")
    from benchmarks.compiled import FOLDER, Line

    files = list(FOLDER.glob("*/report.jsonl"))
    assert files
    for file in files:
        lines = [Line(**json.loads(line)) for line in file.read_text().splitlines()]
        assert {line.target for line in lines} == {"sm_80", "sm_90", "sm_100", "gfx942"}
        assert not [line for line in lines if line.spills]
        assert (file.parent / "roofline.png").exists()


# ---------------------------------------------------------------------------------------------------------------- bytes


def test_eager_bytes_are_counted_call_by_call() -> None:
    s = 4
    read_write, gate_backward = 2 * s, 3 * s
    assert traffic.eager_calls(workload_of("hardshrink")) == [
        ("hardshrink", read_write),
        ("hardshrink_backward", gate_backward),
    ]
    assert traffic.eager_calls(workload_of("threshold_grad")) == [("hardshrink", read_write)], "the forward is a view"
    in_place = traffic.eager_calls(workload_of("threshold_gradients_"))
    assert sum(size for _, size in in_place) == pytest.approx(read_write)


@pytest.mark.slow
def test_compiled_bytes_are_those_of_inductors_kernels() -> None:
    """Of a byte for each element saved, not of a bit: a mask of bools."""
    found = traffic.count(workload_of("hardshrink"))
    with_a_byte, with_a_bit = 4 * (4 + 0.5), 4 * (4 + 0.0625)
    assert (found.eager, found.compiled, found.compiled_grad, found.this) == (20, with_a_byte, None, with_a_bit)


def test_committed_bytes_are_whole_and_those_of_the_registry() -> None:
    lines = json.loads((records.RESULTS / "bytes.json").read_text())
    made = {(line["op"], line["dtype"]): line for line in lines}
    expected = [w for dtype in traffic.DTYPES for w in all_workloads(getattr(torch, dtype), traffic.NUMEL)]
    assert [(w.name, str(w.dtype).removeprefix("torch.")) for w in expected] == list(made)
    for workload, line in zip(expected, made.values()):
        assert line["this"] == round(workload.bytes[workload.modes[-1]] / workload.numel, 2), "run benchmarks bytes"


# ------------------------------------------------------------------------------------------------------- tune, and steps


@pytest.mark.slow
def test_tune_on_a_pretended_gpu(tmp_path: Path) -> None:
    """A process of its own: Triton's driver, once asked for, stays."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tests.rehearsal", "triton_thresh", "tune", "--out", str(tmp_path / "table.json")]
    command += ["--ops", "hardshrink,threshold_mse_loss", "--sizes", "10", "--dtypes", "bfloat16"]
    environment = {**os.environ, "TRITON_THRESH_CACHE_DIR": str(tmp_path / "cache"), "TRITON_THRESH_AUTOTUNE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    table = json.loads((tmp_path / "table.json").read_text())
    assert set(table) == {"hardshrink/bfloat16/10", "mse.ByPrediction.none/bfloat16/10"}
    assert json.loads((tmp_path / "cache" / "pretended_GPU.json").read_text()) == table


def test_tune_says_that_no_search_may_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tune, "gpu", lambda: torch.device("cpu"))
    monkeypatch.setenv("TRITON_THRESH_AUTOTUNE", "0")
    assert cli.main(["tune"]) == 2
    assert "no search may run" in capsys.readouterr().err


def step(name: str, code: str, share: float = 0.9, **fields: Any) -> gpu.Step:
    return gpu.Step(name, [sys.executable, "-c", code], share, **fields)


def test_steps_are_run_in_order_and_a_cut_off_run_keeps_what_it_had(tmp_path: Path) -> None:
    planned = [
        step("good", "print('fine')"),
        step("bad", "import sys; print('broke'); sys.exit(3)"),
        step("absent", "", needs="ncu is not on the PATH"),
        gpu.Step("no such program", ["/nowhere/at/all"], 0.9),
        step("slow", "import time; print('begun', flush=True); time.sleep(60)", share=0.05),
        step("finding", "import sys; print('2 slower'); sys.exit(1)", finding=1),
    ]
    outcomes = gpu.run_steps(planned, 40, tmp_path)
    assert [outcome.status for outcome in outcomes] == ["passed", "failed", "not run", "failed", "timed out", "passed"]
    assert outcomes[1].why == "exit code 3; broke"
    assert outcomes[2].why == "ncu is not on the PATH"
    assert outcomes[5].why == "2 slower"
    assert (tmp_path / outcomes[4].log).read_text().startswith("begun")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [found["status"] for found in summary["steps"]] == [outcome.status for outcome in outcomes]


def test_the_summary_is_written_after_every_step(tmp_path: Path) -> None:
    look = f"import json; print([s['name'] for s in json.load(open({str(tmp_path / 'summary.json')!r}))['steps']])"
    outcomes = gpu.run_steps([step("first", ""), step("second", look)], 60, tmp_path)
    assert (tmp_path / outcomes[1].log).read_text().strip() == "['first']"


def test_steps_past_the_limit_are_not_run(tmp_path: Path) -> None:
    clock: Iterator[float] = iter([0.0, 0.0, 58.0])
    outcomes = gpu.run_steps([step("first", ""), step("late", "")], 60, tmp_path, clock=lambda: next(clock))
    assert [outcome.status for outcome in outcomes] == ["passed", "not run"]
    assert outcomes[1].why == "the limit of 60 s was used up"


def test_without_a_gpu_its_steps_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    needing = {planned.name: planned.needs for planned in gpu.steps(tmp_path, rehearse=False)}
    assert needing.pop("versions") is None
    assert set(needing.values()) == {gpu.NO_GPU}
    rehearsed = {planned.name for planned in gpu.steps(tmp_path, rehearse=True) if planned.needs is None}
    assert rehearsed == {"versions", "benchmark", "calls", "tune", "benchmark, tuned", "compare"}
