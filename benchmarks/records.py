"""One measurement a line, and the stamp that says where it was made. A file is one run, and holds records of one stamp alone."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from triton_thresh.tuning import slug

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"  # committed
LOCAL = ROOT / "bench-results"  # ignored by git: where results go unless asked otherwise


@dataclass(frozen=True)
class Stamp:
    """The facts behind a figure. driver and cuda are None on a CPU, threads on a GPU, triton where it is not installed."""

    device: str
    driver: str | None
    cuda: str | None
    torch: str
    triton: str | None
    commit: str
    threads: int | None = None

    @property
    def folder(self) -> str:
        """The name of the device's folder of results."""
        return slug(self.device) if self.cuda else f"cpu-{slug(self.device)}"


@dataclass(frozen=True)
class Record:
    """One op, dtype, size, mode and provider.

    bytes: the op's own formula (registry), the same for every provider. gbps: bytes over ms. copy_fraction: gbps over that of
    a copy of the same dtype and numel in the same run. None: does not apply (a CPU has no launches, no host time of its own;
    an op that moves nothing has no bandwidth) or, with `error`, was not measured.
    """

    op: str
    dtype: str
    numel: int
    mode: str
    provider: str
    ms: float | None
    ms_p20: float | None
    ms_p80: float | None
    bytes: int
    gbps: float | None
    copy_fraction: float | None
    peak_bytes: int | None
    host_us: float | None
    launches: int | None
    device: str
    driver: str | None
    cuda: str | None
    torch: str
    triton: str | None
    commit: str
    timestamp: str
    threads: int | None = None
    blocks: str | None = None
    error: str | None = None

    @property
    def stamp(self) -> Stamp:
        return Stamp(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Stamp)})

    @property
    def key(self) -> tuple[str, str, int, str, str]:
        """The thing measured, whatever it is measured on."""
        return self.op, self.dtype, self.numel, self.mode, self.provider

    @property
    def on_cpu(self) -> bool:
        return self.cuda is None


class MixedRecordsError(ValueError):
    """Records of different stamps met in one file."""


def now() -> str:
    """This moment, in UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def commit(root: Path = ROOT) -> str:
    """The short commit, "-dirty" if anything but results differs from it; "unknown" outside git."""
    command = ("git", "-C", str(root))
    try:
        head = _output(*command, "rev-parse", "--short", "HEAD")
        changed = _output(*command, "status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}-dirty" if changed else head


def stamp(device: torch.device) -> Stamp:
    """Where and with what a run on `device` measures."""
    try:
        triton: str | None = version("triton")
    except PackageNotFoundError:
        triton = None
    if device.type == "cpu":
        return Stamp(cpu_name(), None, None, torch.__version__, triton, commit(), torch.get_num_threads())
    runtime = torch.version.cuda or f"hip {torch.version.hip}"
    return Stamp(torch.cuda.get_device_name(device), _driver(), runtime, torch.__version__, triton, commit())


def cpu_name() -> str:
    """The model's name."""
    try:
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _driver() -> str | None:
    """As nvidia-smi names it; None where there is none."""
    try:
        return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()


def read(paths: Path | Iterable[Path]) -> list[Record]:
    """The records of files of one stamp each; of a key measured twice in a file the later one."""
    found = []
    for path in [paths] if isinstance(paths, Path) else paths:
        records = [_record(line, path, number) for number, line in enumerate(path.read_text().splitlines(), 1) if line]
        refuse_mixture(records, str(path))
        found += list({record.key: record for record in records}.values())
    return found


def files(path: Path) -> list[Path]:
    """A file of records, or all those of a device's folder, or of a folder of such."""
    return sorted([*path.glob("*.jsonl"), *path.glob("*/*.jsonl")]) if path.is_dir() else [path]


def newest(folder: Path = RESULTS) -> list[Path]:
    """For each device the file that was last written to, by its last record."""
    places = sorted({path.parent for path in folder.glob("*/*.jsonl")})
    return [max(place.glob("*.jsonl"), key=lambda path: read(path)[-1].timestamp) for place in places]


def _record(line: str, path: Path, number: int) -> Record:
    try:
        return Record(**json.loads(line))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}, line {number}: not a record of the benchmark: {error}") from None


def refuse_mixture(records: Sequence[Record], origin: str) -> None:
    """MixedRecordsError, with the fields that differ, if the records are not all of one stamp."""
    stamps = list({record.stamp: None for record in records})
    if len(stamps) > 1:
        raise MixedRecordsError(f"{origin} mixes records that differ in {_difference(stamps[0], stamps[1])}")


def _difference(one: Stamp, other: Stamp) -> str:
    fields = [(f.name, getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(Stamp)]
    return "; ".join(f"{name}: {a!r} and {b!r}" for name, a, b in fields if a != b)


class Writer:
    """Appends records to a file as they are made. The file must be new, or that of a run of this stamp that goes on."""

    def __init__(self, path: Path, stamp: Stamp, *, resume: bool = False) -> None:
        self.path, self.stamp = path, stamp
        self.held = read(path) if resume else []
        if self.held and self.held[0].stamp != stamp:
            raise MixedRecordsError(f"{path} is of another run ({_difference(self.held[0].stamp, stamp)})")
        if not resume and path.exists():
            raise MixedRecordsError(f"{path} is of another run; name another file, or --resume it")
        path.parent.mkdir(parents=True, exist_ok=True)

    @classmethod
    def in_folder(cls, folder: Path, stamp: Stamp) -> Writer:
        """In <folder>/<device>/<date>-<commit>.jsonl, or in the first free one of <...>-2.jsonl and so on."""
        name = f"{now()[:10]}-{stamp.commit}"
        suffixes = ("", *(f"-{number}" for number in range(2, 1000)))
        paths = (folder / stamp.folder / f"{name}{suffix}.jsonl" for suffix in suffixes)
        return cls(next(path for path in paths if not path.exists()), stamp)

    def write(self, record: Record) -> None:
        if record.stamp != self.stamp:
            raise MixedRecordsError(f"{self.path}: record differs in {_difference(self.stamp, record.stamp)}")
        with self.path.open("a") as file:
            file.write(json.dumps(dataclasses.asdict(record)) + "\n")
            file.flush()
            os.fsync(file.fileno())
