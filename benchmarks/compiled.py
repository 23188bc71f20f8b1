"""The compile report: every kernel of the registry compiled for every target, with no GPU."""

from __future__ import annotations

import functools
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import triton
from matplotlib.figure import Figure

from benchmarks import records, roofline
from benchmarks.aot import TARGETS, Report, compile_kernel
from benchmarks.cases import Case, cases
from benchmarks.plots import save
from benchmarks.roofline import Gpu, Point
from benchmarks.tables import markdown

FOLDER = records.RESULTS / "compile"
PICTURED = "sm_90"


@dataclass(frozen=True)
class Line:
    """A compiled case. "hot": the path of a full tile; per element: a thread's count times threads over a program's elements."""

    target: str
    op: str
    kernel: str
    dtype: str
    operands: str
    num_warps: int
    elements: int
    registers: int
    scalar_registers: int
    spills: int
    shared_bytes: int
    load_bits: dict[str, int]
    store_bits: dict[str, int]
    instructions: int
    hot_instructions: int
    instructions_per_element: float
    special_functions_per_element: float
    bytes_per_element: float
    triton: str
    commit: str

    @property
    def point(self) -> Point:
        name = f"{self.op} {self.kernel}" + ("" if self.operands in ("-", "number") else f", {self.operands}")
        way = next((way for way in ("forward", "backward") if way in self.kernel), None)
        shell = "loss" if "." in self.op else "learned gate" if "learned" in self.kernel else "gate"
        return Point(
            name,
            f"{shell} {way}" if way else "others",
            self.dtype,
            self.instructions_per_element,
            self.special_functions_per_element,
            self.bytes_per_element,
        )


def compile_case(case: Case, target: str) -> Report:
    """The compiler's report of a case."""
    return compile_kernel(
        case.jit, case.arguments, target, num_warps=case.num_warps, elements=case.elements, tiles=case.tiles
    )


def line(case: Case, report: Report, commit: str) -> Line:
    """A case and its figures."""
    return Line(
        target=report.target,
        op=case.op,
        kernel=case.kernel,
        dtype=case.dtype,
        operands=case.operands,
        num_warps=report.num_warps,
        elements=report.elements,
        registers=report.registers,
        scalar_registers=report.scalar_registers,
        spills=report.spills,
        shared_bytes=report.shared_bytes,
        load_bits=_widths(report.hot.load_bits),
        store_bits=_widths(report.hot.store_bits),
        instructions=report.instructions,
        hot_instructions=report.hot.instructions,
        instructions_per_element=round(report.hot_instructions_per_element, 3),
        special_functions_per_element=round(report.special_functions_per_element, 3),
        bytes_per_element=round(report.hot_bytes_per_element, 3),
        triton=triton.__version__,
        commit=commit,
    )


def _widths(bits: Counter[int]) -> dict[str, int]:
    return {str(width): times for width, times in sorted(bits.items(), reverse=True)}


@functools.cache
def _cases(dtype: str, lanes: int) -> tuple[Case, ...]:
    return tuple(cases((dtype,), lanes))


Job = tuple[str, str, int]  # target, dtype, number of the case: what a process that compiles finds it by


def _compiled(job: Job) -> Report:
    target, dtype, number = job
    return compile_case(_cases(dtype, TARGETS[target].warp_size)[number], target)


class Compilation:
    """Every case for these targets and dtypes; what ops share is compiled once."""

    def __init__(self, targets: Iterable[str], dtypes: Iterable[str]) -> None:
        self.cases: list[tuple[Case, Job]] = []
        first: dict[tuple[str, str], Job] = {}
        for target, dtype in itertools.product(targets, tuple(dtypes)):
            for number, case in enumerate(_cases(dtype, TARGETS[target].warp_size)):
                form = f"{case.jit.fn.__qualname__} {case.arguments} {case.num_warps}"
                self.cases.append((case, first.setdefault((target, form), (target, dtype, number))))
        self.jobs = list(first.values())
        self.reports: dict[Job, Report] = {}

    def run(self, processes: int | None = None) -> Iterator[Report]:
        """Compile, in so many processes (default: one a core)."""
        with ProcessPoolExecutor(processes or os.cpu_count(), mp_context=get_context("spawn")) as pool:
            for job, report in zip(self.jobs, pool.map(_compiled, self.jobs, chunksize=4)):
                self.reports[job] = report
                yield report

    def lines(self) -> list[Line]:
        commit = records.commit()
        return [line(case, self.reports[job], commit) for case, job in self.cases]


def read(path: Path) -> list[Line]:
    """The lines of a report.jsonl."""
    return [Line(**json.loads(line)) for line in path.read_text().splitlines()]


def write(lines: list[Line], folder: Path, gpu: Gpu) -> list[Path]:
    """report.jsonl, a table a target, and the roofline picture, in a folder of this Triton version."""
    place = folder / f"triton-{triton.__version__}"
    place.mkdir(parents=True, exist_ok=True)
    data = place / "report.jsonl"
    data.write_text("".join(json.dumps(asdict(found)) + "\n" for found in lines))
    made = [data]
    targets = list(dict.fromkeys(found.target for found in lines))
    for target in targets:
        path = place / f"{target}.md"
        path.write_text(text(target, [found for found in lines if found.target == target], gpu), encoding="utf-8")
        made.append(path)
    return made + (save(picture(lines), place / "roofline") if PICTURED in targets else [])


def picture(lines: list[Line]) -> Figure:
    """The roofline of one architecture."""
    points = dict.fromkeys(
        found.point
        for found in lines
        if found.target == PICTURED and found.operands in ("number", "row", "-") and found.kernel != "finish"
    )
    return roofline.draw(list(points), f"{PICTURED}, triton {lines[0].triton}, commit {lines[0].commit}")


HEADS = ("op", "kernel", "dtype", "operands", "registers", "spills", "shared bytes", "loads", "stores", "instr/elem",
         "special/elem", "bytes/elem")  # fmt: skip


def text(target: str, lines: list[Line], gpu: Gpu) -> str:
    """A target's report in Markdown, with what the model says of the named GPU where it runs this target."""
    timed = gpu.target == target
    heads = HEADS + ((f"bytes ps/elem ({gpu.name})", "issue", "special", "bound") if timed else ())
    intro = (
        f"Compiled ahead of time by triton {triton.__version__} at commit {lines[0].commit}; no GPU took part. Figures per "
        "element are those of a full tile; loads and stores are global accesses of a thread, width in bits × count; spills on "
        "NVIDIA are bytes of stack plus accesses to local memory, on AMD vector registers plus such accesses. Operands that "
        "broadcast count as if they came from memory."
    )
    model = (
        f"\n\n**Modelled, not measured.** Picoseconds are the least an element can take on an {gpu.name}: its bytes over "
        f"{gpu.bytes_per_second / 1e12:g} TB/s, its instructions over {gpu.sms} SMs × 4 schedulers × 32 lanes × "
        f"{gpu.boost_hz / 1e9:g} GHz, its special functions over 16 a clock an SM. The sources of the rates are in "
        "`benchmarks/roofline.py`."
    )
    table = markdown(heads, (_cells(found, gpu if timed else None) for found in lines), left=4)
    return f"# {target}\n\n{intro}{model if timed else ''}\n\n{table}\n"


def _cells(found: Line, gpu: Gpu | None) -> list[str]:
    row = [
        f"`{found.op}`",
        found.kernel,
        found.dtype,
        found.operands,
        str(found.registers),
        str(found.spills),
        str(found.shared_bytes),
        _accesses(found.load_bits),
        _accesses(found.store_bits),
        f"{found.instructions_per_element:.1f}",
        f"{found.special_functions_per_element:.2f}",
        f"{found.bytes_per_element:.3g}",
    ]
    if gpu:
        times = found.point.picoseconds(gpu)
        row += [f"{time:.2f}" for time in times.values()] + [found.point.bound(gpu)]
    return row


def _accesses(bits: Mapping[str, int]) -> str:
    return ", ".join(f"{width}×{times}" for width, times in bits.items()) or "–"
