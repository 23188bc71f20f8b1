"""Block sizes: where they come from, in which order, and what a bad table does (nothing but warn)."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from triton_thresh import tuning
from triton_thresh.tuning import Choice, Config, Kind

CPU = torch.device("cpu")
GPU = "NVIDIA H200"
KEY = "hardshrink/float32/10"


own_device_name = tuning.device_name


@pytest.fixture(autouse=True)
def on_a_pretended_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A named device, an empty table of the user's on disk, and nothing settled yet."""
    monkeypatch.setenv("TRITON_THRESH_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("TRITON_THRESH_AUTOTUNE", raising=False)
    monkeypatch.setattr(tuning, "interpreting", lambda: False)
    monkeypatch.setattr(tuning, "device_name", lambda device: GPU)
    monkeypatch.setattr(tuning, "_settled", {})
    tuning.table.cache_clear()
    yield
    tuning.table.cache_clear()


class Stopwatch:
    """do_bench that reads times from a dict by config instead of a clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: dict[Config, float]) -> None:
        import triton.testing

        self.times, self.ran = times, list[Config]()
        monkeypatch.setattr(triton.testing, "do_bench", self)

    def __call__(self, launch: Callable[[], object], **_: Any) -> float:
        launch()
        return self.times.get(self.ran[-1], 100.0)


def choose(
    launch: Callable[[Config], object] | None = None,
    *,
    kind: Kind = "gate",
    op: str = "hardshrink",
    numel: int = 1000,
    searches: bool = True,
) -> Choice:
    return tuning.choose(kind, op, torch.float32, numel, CPU, launch, searches=searches)


def never(config: Config) -> None:
    raise AssertionError("searched")


# --------------------------------------------------------------------------------------------------- sizes and defaults


@pytest.mark.parametrize(
    ("numel", "bucket"),
    [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (1024, 10), (1025, 11), (2**31, 31), (2**31 + 1, 32)],
)
def test_buckets_are_powers_of_two(numel: int, bucket: int) -> None:
    assert tuning.bucket_of(numel) == bucket


@pytest.mark.parametrize("kind", ["gate", "loss"])
@pytest.mark.parametrize("itemsize", [1, 2, 4, 8])
def test_candidates_are_valid_and_start_with_the_default(kind: Kind, itemsize: int) -> None:
    found = tuning.candidates(kind, itemsize)
    assert found[0] == tuning.default(kind, itemsize)
    assert len(set(found)) == len(found) > 1
    assert all(tuning._is_config(list(config)) for config in found)


def test_the_interpreter_has_one_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "interpreting", lambda: True)
    assert choose(never) == Choice(tuning.INTERPRETER["gate"], "interpreter")


# ------------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"x"', "\x00"])
def test_what_is_no_table_is_ignored_with_a_warning(text: str) -> None:
    with pytest.warns(UserWarning, match=r"ignoring some\.json"):
        assert tuning.parse(text, "some.json") == {}


@pytest.mark.parametrize(
    "entry",
    [
        None, 256, "256", [], [256], [256, 4, 1], [256, "4"], [256.0, 4], [True, 4], [0, 4], [-256, 4], [100, 4],
        [16, 4], [131072, 4], [65536, 1], [256, 3], [256, 0], [256, 64], {"block": 256},
    ],
    ids=str,
)  # fmt: skip
def test_a_malformed_entry_is_left_out_with_a_warning(entry: object) -> None:
    text = json.dumps({KEY: [256, 4], "hardshrink/float32/11": entry})
    with pytest.warns(UserWarning, match=r"1 malformed entries of some\.json"):
        assert tuning.parse(text, "some.json") == {KEY: Config(256, 4)}


def test_a_good_table_gives_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuning.parse(json.dumps({KEY: [256, 4]}), "some.json") == {KEY: Config(256, 4)}


@pytest.mark.parametrize(
    ("device", "file"),
    [("NVIDIA H200", "NVIDIA_H200"), ("AMD Instinct MI300X/OAM", "AMD_Instinct_MI300X_OAM"), ("../x", "x")],
)
def test_device_names_as_file_names(device: str, file: str) -> None:
    assert tuning.table_path(device).stem == file


# ----------------------------------------------------------------------------------------------------------------- disk


def test_the_table_is_written_and_read(tmp_path: Path) -> None:
    tuning.remember(GPU, {KEY: Config(256, 2)})
    tuning.remember(GPU, {"hardshrink/bfloat16/10": Config(512, 2)})
    path = tmp_path / "cache" / "NVIDIA_H200.json"
    assert tuning.table_path(GPU) == path
    assert json.loads(path.read_text()) == {KEY: [256, 2], "hardshrink/bfloat16/10": [512, 2]}
    assert [entry.name for entry in path.parent.iterdir()] == [path.name], "no temporary file is left"
    tuning.table.cache_clear()
    assert tuning.table(GPU) == {KEY: Config(256, 2), "hardshrink/bfloat16/10": Config(512, 2)}


def test_the_table_lies_at_home_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TRITON_THRESH_CACHE_DIR")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert tuning.table_path(GPU) == tmp_path / ".cache" / "triton_thresh" / "NVIDIA_H200.json"


@pytest.mark.parametrize("text", ["not json", '{"hardshrink/float32/10": [1, 2, 3]}'])
def test_a_spoilt_table_warns_and_is_replaced(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tuning.table_path(GPU)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    clock = Stopwatch(monkeypatch, {Config(512, 4): 1.0})
    with pytest.warns(UserWarning, match="ignoring"):
        assert choose(clock.ran.append) == Choice(Config(512, 4), "search")
    assert json.loads(path.read_text()) == {KEY: [512, 4]}


def test_a_table_that_is_no_text_is_no_error() -> None:
    path = tuning.table_path(GPU)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.warns(UserWarning, match="ignoring"):
        assert tuning.table(GPU) == {}


def test_a_disk_that_cannot_be_written_to_warns(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="not saved"):
        tuning.remember(GPU, {KEY: Config(256, 2)})
    assert tuning.table(GPU)[KEY] == Config(256, 2), "kept in memory"


# --------------------------------------------------------------------------------------------------------------- search


def test_search_takes_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    configs = tuning.candidates("gate", 4)
    for fastest in configs:
        clock = Stopwatch(monkeypatch, {fastest: 1.0})
        assert tuning.search(configs, clock.ran.append) == fastest
        assert clock.ran == configs


def test_search_passes_over_what_the_gpu_cannot_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import OutOfResources

    configs = tuning.candidates("gate", 4)
    clock = Stopwatch(monkeypatch, dict.fromkeys(configs, 1.0))

    def launch(config: Config) -> None:
        if config not in fitting:
            raise OutOfResources(2, 1, "shared memory")
        clock.ran.append(config)

    fitting = configs[2:3]
    assert tuning.search(configs, launch) == configs[2]
    fitting = []
    assert tuning.search(configs, launch) == configs[0], "the default, which then says what is wrong"


def test_search_runs_once_a_bucket_and_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Stopwatch(monkeypatch, {Config(256, 2): 1.0})
    assert choose(clock.ran.append) == Choice(Config(256, 2), "search")
    for numel in (513, 1000, 1024):
        assert choose(never, numel=numel) == Choice(Config(256, 2), "search")
    again = len(clock.ran)
    choose(clock.ran.append, numel=1025)
    assert len(clock.ran) > again
    tuning._settled.clear()
    tuning.table.cache_clear()
    assert choose(never) == Choice(Config(256, 2), "user's table")


def test_order_of_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's table, then a search, then the default."""
    clock = Stopwatch(monkeypatch, {Config(1024, 8): 1.0})
    assert choose(None) == Choice(tuning.default("gate", 4), "default")
    assert choose(clock.ran.append) == Choice(Config(1024, 8), "search"), "the default was not settled on"
    tuning._settled.clear()
    tuning.remember(GPU, {KEY: Config(256, 1)})
    assert choose(never) == Choice(Config(256, 1), "user's table")


@pytest.mark.parametrize("why", ["process group", "graph capture", "switched off"])
def test_no_search_where_ranks_could_disagree_or_a_graph_is_captured(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tuning.remember(GPU, {KEY: Config(256, 1)})
    ranks = why == "process group"
    if ranks:
        monkeypatch.setattr(torch.distributed, "is_available", lambda: True)
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    elif why == "graph capture":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    else:
        monkeypatch.setenv("TRITON_THRESH_AUTOTUNE", "0")
    assert not tuning.may_search()
    found = Choice(tuning.default("gate", 4), "default") if ranks else Choice(Config(256, 1), "user's table")
    assert choose(never) == found, "ranks may have other tables"
    assert choose(never, numel=5).source == "default"


def test_a_search_put_off_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_THRESH_AUTOTUNE", "0")
    assert choose(never).source == "default"
    monkeypatch.delenv("TRITON_THRESH_AUTOTUNE")
    clock = Stopwatch(monkeypatch, {Config(1024, 8): 1.0})
    assert choose(clock.ran.append) == Choice(Config(1024, 8), "search")


def test_reductions_never_search() -> None:
    """Block and warps fix the order of summation, and with it the bits: neither table nor search may change them."""
    default = Choice(tuning.default("loss", 4), "default")
    for numel in (10, 1000, 10**6):
        tuning.remember(GPU, {f"mse.ByLoss/float32/{tuning.bucket_of(numel)}": Config(256, 1)})
        assert choose(never, kind="loss", op="mse.ByLoss", numel=numel, searches=False) == default


def test_losses_ask_for_no_search_when_they_reduce(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a loss asks of tuning, for each reduction."""
    pytest.importorskip("triton")
    from triton_thresh import losses
    from triton_thresh.bases import MSE
    from triton_thresh.cells import specify
    from triton_thresh.rules import ByLoss

    asked: list[tuple[str, bool]] = []

    class AskedError(Exception):
        pass

    def spy(kind: Kind, op: str, *_: Any, searches: bool) -> Choice:
        asked.append((op, searches))
        raise AskedError

    monkeypatch.setattr(tuning, "choose", spy)
    x = torch.rand(8)
    for reduction in ("mean", "sum", "none"):
        spec, operands = specify(MSE(), ByLoss(), {}, False, reduction, torch.float32)
        with pytest.raises(AskedError):
            losses.loss_forward(spec, x, x, operands, want_gradient=True)
    assert asked == [("mse.ByLoss", False), ("mse.ByLoss", False), ("mse.ByLoss.none", True)]


def test_the_device_module_is_asked_for_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cuda:
        def __getattr__(self, name: str) -> Callable[..., str]:
            assert callable(getattr(torch.cuda, name)), name
            return lambda device: f"{name} of {device}"

    monkeypatch.setattr(torch, "get_device_module", lambda device: Cuda())
    own_device_name.cache_clear()
    assert own_device_name(torch.device("cuda", 1)) == "get_device_name of cuda:1"
    own_device_name.cache_clear()
