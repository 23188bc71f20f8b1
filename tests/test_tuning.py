"""Block sizes: where they come from, in which order, and what a bad table does (nothing but warn)."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from triton_thresh.measured import Config, Table

from triton_thresh import measured, tuning
from triton_thresh.tuning import Choice

CPU = torch.device("cpu")
GPU = "NVIDIA H200"
KEY = "hardshrink/float32/10"
TABLE = {"hardshrink/float32/10": Config(256, 2), "hardshrink/float32/20": Config(512, 8)}


own_device_name = tuning.device_name


@pytest.fixture(autouse=True)
def on_a_pretended_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A named device with no shipped table, an empty cache on disk, and nothing settled yet."""
    monkeypatch.setenv("TRITON_THRESH_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("TRITON_THRESH_AUTOTUNE", raising=False)
    monkeypatch.setattr(tuning, "interpreting", lambda: False)
    monkeypatch.setattr(tuning, "device_name", lambda device: GPU)
    monkeypatch.setattr(tuning, "_settled", {})
    monkeypatch.setattr(measured, "shipped", lambda name: Table({}, {}))
    measured.cached.cache_clear()
    yield
    measured.cached.cache_clear()


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
    shell: str = "gate",
    op: str = "hardshrink",
    numel: int = 1000,
    searchable: bool = True,
) -> Choice:
    return tuning.choose(shell, op, torch.float32, numel, CPU, searchable, launch)


def never(config: Config) -> None:
    raise AssertionError("searched")


# --------------------------------------------------------------------------------------------------- sizes and defaults


@pytest.mark.parametrize(
    ("numel", "bucket"),
    [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (1024, 10), (1025, 11), (2**31, 31), (2**31 + 1, 32)],
)
def test_buckets_are_powers_of_two(numel: int, bucket: int) -> None:
    assert tuning.bucket(numel) == bucket


@pytest.mark.parametrize(("size", "found"), [(0, 10), (10, 10), (14, 10), (15, 10), (16, 20), (20, 20), (40, 20)])
def test_nearest_size_and_the_smaller_of_two(size: int, found: int) -> None:
    assert measured.nearest(TABLE, "hardshrink", "float32", size) == TABLE[f"hardshrink/float32/{found}"]


def test_nearest_keeps_to_its_op_and_dtype() -> None:
    assert measured.nearest(TABLE, "hardshrink", "bfloat16", 10) is None
    assert measured.nearest(TABLE, "shrink", "float32", 10) is None
    assert measured.nearest(TABLE, "hard", "float32", 10) is None
    assert measured.nearest({"hardshrink/float32/x": Config(256, 2)}, "hardshrink", "float32", 10) is None


@pytest.mark.parametrize("shell", ["gate", "loss"])
@pytest.mark.parametrize("itemsize", [1, 2, 4, 8])
def test_candidates_are_valid_and_start_with_the_default(shell: str, itemsize: int) -> None:
    found = tuning.candidates(shell, itemsize)
    assert found[0] == tuning.default(shell, itemsize)
    assert len(set(found)) == len(found) > 1
    assert all(measured._is_config(list(config)) for config in found)


def test_the_interpreter_has_one_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "interpreting", lambda: True)
    assert choose(never) == Choice(tuning.INTERPRETER["gate"], "interpreter")


# ------------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", '"x"', "{}", '{"entries": 3}', '{"entries": [1]}', '{"device": "x"}', "\x00"]
)
def test_what_is_no_table_is_ignored_with_a_warning(text: str) -> None:
    with pytest.warns(UserWarning, match=r"ignoring some\.json"):
        assert measured.parse(text, "some.json").entries == {}


@pytest.mark.parametrize(
    "entry",
    [
        None, 256, "256", [], [256], [256, 4, 1], [256, "4"], [256.0, 4], [True, 4], [0, 4], [-256, 4], [100, 4],
        [16, 4], [131072, 4], [65536, 1], [256, 3], [256, 0], [256, 64], {"block": 256},
    ],
    ids=str,
)  # fmt: skip
def test_a_malformed_entry_is_left_out_with_a_warning(entry: object) -> None:
    text = json.dumps({"device": GPU, "entries": {KEY: [256, 4], "hardshrink/float32/11": entry}})
    with pytest.warns(UserWarning, match=r"1 malformed entries of some\.json"):
        assert measured.parse(text, "some.json").entries == {KEY: Config(256, 4)}


def test_a_good_table_gives_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert measured.parse(json.dumps({"entries": {KEY: [256, 4]}, "more": 1}), "some.json").entries == {
            KEY: Config(256, 4)
        }


def test_shipped_tables_are_good() -> None:
    """Every table in the package parses without a warning, under the name of its device."""
    folder = Path(measured.__file__).parent / "tuned"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in folder.glob("*.json"):
            assert measured.parse(path.read_text(), str(path)).entries
            assert measured.slug(json.loads(path.read_text())["device"]) == path.stem


@pytest.mark.parametrize(
    ("device", "file"),
    [("NVIDIA H200", "NVIDIA_H200"), ("AMD Instinct MI300X/OAM", "AMD_Instinct_MI300X_OAM"), ("../x", "x")],
)
def test_device_names_as_file_names(device: str, file: str) -> None:
    assert measured.slug(device) == file


# --------------------------------------------------------------------------------------------------------------- cache


def test_the_cache_is_written_and_read(tmp_path: Path) -> None:
    measured.remember(GPU, {KEY: Config(256, 2)})
    measured.remember(GPU, {"hardshrink/bfloat16/10": Config(512, 2)})
    path = tmp_path / "cache" / "NVIDIA_H200.json"
    assert measured.cache_path(GPU) == path
    assert json.loads(path.read_text())["entries"] == {KEY: [256, 2], "hardshrink/bfloat16/10": [512, 2]}
    assert [entry.name for entry in path.parent.iterdir()] == [path.name], "no temporary file is left"
    measured.cached.cache_clear()
    assert measured.cached(GPU).entries == {KEY: Config(256, 2), "hardshrink/bfloat16/10": Config(512, 2)}


def test_the_cache_lies_at_home_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TRITON_THRESH_CACHE_DIR")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert measured.cache_path(GPU) == tmp_path / ".cache" / "triton_thresh" / "NVIDIA_H200.json"


@pytest.mark.parametrize("text", ["not json", '{"entries": {"hardshrink/float32/10": [1, 2, 3]}}'])
def test_a_spoilt_cache_warns_and_is_replaced(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = measured.cache_path(GPU)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    clock = Stopwatch(monkeypatch, {Config(512, 4): 1.0})
    with pytest.warns(UserWarning, match="ignoring"):
        assert choose(clock.ran.append) == Choice(Config(512, 4), "search")
    assert json.loads(path.read_text())["entries"] == {KEY: [512, 4]}


def test_a_cache_that_is_no_text_is_no_error() -> None:
    path = measured.cache_path(GPU)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.warns(UserWarning, match="ignoring"):
        assert measured.cached(GPU).entries == {}


def test_a_disk_that_cannot_be_written_to_warns(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="not saved"):
        measured.remember(GPU, {KEY: Config(256, 2)})
    assert measured.cached(GPU).entries[KEY] == Config(256, 2), "kept in memory"


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


def test_collecting_searches_whatever_the_tables_say_and_leaves_them_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "shipped", lambda name: Table(TABLE, {}))
    clock = Stopwatch(monkeypatch, {Config(1024, 8): 1.0})
    found: dict[str, Config] = {}
    with tuning.collecting(found):
        assert choose(clock.ran.append) == Choice(Config(1024, 8), "search")
        assert choose(never) == Choice(Config(1024, 8), "search"), "once a key"
        assert choose(never, shell="loss", op="mse.ByLoss", searchable=False).source == "default"
    assert found == {KEY: Config(1024, 8)}
    assert choose(never) == Choice(Config(256, 2), "shipped table")
    assert measured.cached(GPU).entries == {}


def test_collecting_is_refused_where_no_search_may_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_THRESH_AUTOTUNE", "0")
    with pytest.raises(RuntimeError, match="no search may run"), tuning.collecting({}):
        pass


def test_search_runs_once_a_bucket_and_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Stopwatch(monkeypatch, {Config(256, 2): 1.0})
    assert choose(clock.ran.append) == Choice(Config(256, 2), "search")
    for numel in (513, 1000, 1024):
        assert choose(never, numel=numel) == Choice(Config(256, 2), "search")
    again = len(clock.ran)
    choose(clock.ran.append, numel=1025)
    assert len(clock.ran) > again
    tuning._settled.clear()
    measured.cached.cache_clear()
    assert choose(never) == Choice(Config(256, 2), "user cache")


def test_order_of_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shipped table, then cache, then search, then the default."""
    clock = Stopwatch(monkeypatch, {Config(1024, 8): 1.0})
    default = Choice(tuning.default("gate", 4), "default")
    assert choose(None) == default
    assert choose(clock.ran.append) == Choice(Config(1024, 8), "search"), "the default was not settled on"
    tuning._settled.clear()
    measured.remember(GPU, {KEY: Config(256, 1)})
    assert choose(never) == Choice(Config(256, 1), "user cache")
    tuning._settled.clear()
    monkeypatch.setattr(measured, "shipped", lambda name: Table(TABLE if name == GPU else {}, {}))
    assert choose(never) == Choice(Config(256, 2), "shipped table")
    assert choose(never, numel=2**26) == Choice(Config(512, 8), "shipped table"), "the nearest size serves"


@pytest.mark.parametrize("why", ["process group", "graph capture", "switched off"])
def test_no_search_where_ranks_could_disagree_or_a_graph_is_captured(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    measured.remember(GPU, {KEY: Config(256, 1)})
    if why == "process group":
        monkeypatch.setattr(torch.distributed, "is_available", lambda: True)
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    elif why == "graph capture":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    else:
        monkeypatch.setenv("TRITON_THRESH_AUTOTUNE", "0")
    assert not tuning.may_search()
    assert choose(never) == Choice(tuning.default("gate", 4), "default"), "nor is the cache read: ranks may have others"
    monkeypatch.setattr(measured, "shipped", lambda name: Table(TABLE, {}))
    assert choose(never) == Choice(Config(256, 2), "shipped table")


def test_a_search_put_off_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_THRESH_AUTOTUNE", "0")
    assert choose(never).source == "default"
    monkeypatch.delenv("TRITON_THRESH_AUTOTUNE")
    clock = Stopwatch(monkeypatch, {Config(1024, 8): 1.0})
    assert choose(clock.ran.append) == Choice(Config(1024, 8), "search")


def test_reductions_never_search() -> None:
    """Block and warps fix the order of summation, and with it the bits: neither cache nor search may change them."""
    default = Choice(tuning.default("loss", 4), "default")
    for numel in (10, 1000, 10**6):
        measured.remember(GPU, {f"mse.ByLoss/float32/{tuning.bucket(numel)}": Config(256, 1)})
        assert choose(never, shell="loss", op="mse.ByLoss", numel=numel, searchable=False) == default


def test_losses_ask_for_no_search_when_they_reduce(monkeypatch: pytest.MonkeyPatch) -> None:
    """What launch asks of tuning, for each reduction and for backward."""
    pytest.importorskip("triton")
    from triton_thresh import launch, reference
    from triton_thresh.rules import ByLoss

    asked: list[tuple[str, bool]] = []

    class AskedError(Exception):
        pass

    def spy(shell: str, op: str, dtype: Any, numel: int, device: Any, searchable: bool, launch: Any = None) -> Choice:
        asked.append((op, searchable))
        raise AskedError

    monkeypatch.setattr(tuning, "choose", spy)
    x = torch.rand(8)
    for reduction in ("mean", "sum", "none"):
        spec, operands = reference.specify(x, ByLoss(), "mse", reduction=reduction)
        with pytest.raises(AskedError):
            launch.loss_forward(spec, x, x, operands, want_gradient=True)
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
