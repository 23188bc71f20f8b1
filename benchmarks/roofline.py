"""The bound of a kernel on a named GPU, from its machine code alone: modelled, not measured."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from benchmarks.plots import FONT, WIDTH, clean


@dataclass(frozen=True)
class Gpu:
    """The rates of a GPU, as NVIDIA gives them.

    SMs and 4 warp schedulers of 32 lanes an SM: "NVIDIA H100 Tensor Core GPU Architecture" (whitepaper), H100 SXM5; the H200 has
    the same chip. Boost clock: the datasheets' 67 teraFLOPS of FP32 are 132 SMs x 128 FMAs x 2 x 1.98 GHz. Bandwidth: the
    datasheets "NVIDIA H100 Tensor Core GPU" (SXM: 3.35 TB/s) and "NVIDIA H200 Tensor Core GPU" (SXM: 4.8 TB/s). Special
    functions: 16 results a clock an SM, "CUDA C++ Programming Guide", throughput of native arithmetic instructions, 9.0.
    """

    name: str
    target: str
    sms: int
    boost_hz: float
    bytes_per_second: float

    @property
    def instructions_per_second(self) -> float:
        """Instructions a second, of one lane each: SMs x 4 schedulers x 32 lanes x clock."""
        return self.sms * 4 * 32 * self.boost_hz

    @property
    def special_functions_per_second(self) -> float:
        return self.sms * 16 * self.boost_hz

    @property
    def instructions_per_byte(self) -> float:
        """Where the time to issue equals the time to move."""
        return self.instructions_per_second / self.bytes_per_second


GPUS = {
    "H100": Gpu("H100 SXM", "sm_90", 132, 1.98e9, 3.35e12),
    "H200": Gpu("H200 SXM", "sm_90", 132, 1.98e9, 4.8e12),
}


@dataclass(frozen=True)
class Point:
    """A compiled kernel's full tile, per element."""

    name: str
    group: str
    dtype: str
    instructions: float
    special_functions: float
    bytes: float

    def picoseconds(self, gpu: Gpu) -> dict[str, float]:
        """The least time an element takes by each bound."""
        return {
            "bytes": 1e12 * self.bytes / gpu.bytes_per_second,
            "issue": 1e12 * self.instructions / gpu.instructions_per_second,
            "special functions": 1e12 * self.special_functions / gpu.special_functions_per_second,
        }

    def bound(self, gpu: Gpu) -> str:
        """The bound that takes longest."""
        times = self.picoseconds(gpu)
        return max(times, key=lambda name: times[name])


# Okabe and Ito's colours for kinds of kernels; a marker for each dtype.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = {"fp32": "o", "bf16": "^", "fp16": "s"}
NAMED = 5


def draw(points: Sequence[Point], title: str) -> Figure:
    """Bytes against instructions of an element; left of a GPU's line the bytes take longer, above it the instructions."""
    figure = Figure(figsize=(WIDTH, 7.6), layout="constrained")
    axes = figure.subplots()
    right = max(point.bytes for point in points) * 1.12
    top = max(point.instructions for point in points) * 1.1
    for gpu, dashes in zip(GPUS.values(), ("--", "-")):
        axes.plot([0, right], [0, gpu.instructions_per_byte * right], "k", linestyle=dashes, label=gpu.name)
    colors = dict(zip(dict.fromkeys(point.group for point in points), PALETTE))
    style: dict[str, Any] = dict(linestyle="none", markerfacecolor="white", markeredgewidth=1.5, markersize=8)
    for point in points:
        axes.plot(point.bytes, point.instructions, MARKERS[point.dtype], color=colors[point.group], **style)
    for dtype in dict.fromkeys(point.dtype for point in points):
        axes.plot([], [], MARKERS[dtype], color="black", label=dtype, **style)
    for group, color in colors.items():
        axes.plot([], [], color=color, linewidth=6, label=group)
    labelled: list[float] = []
    for point in sorted(points, key=lambda point: -point.instructions / point.bytes):
        if len(labelled) < NAMED and all(abs(point.instructions - y) > top / 25 for y in labelled):
            labelled.append(point.instructions)
            place = (point.bytes + right / 50, point.instructions - top / 100)
            behind = dict(facecolor="white", edgecolor="none", alpha=0.85, pad=0.6)
            axes.text(*place, f"{point.name}, {point.dtype}", fontsize=FONT - 2, bbox=behind)
    axes.set(xlim=(0, right), ylim=(0, top), xlabel="bytes per element", ylabel="instructions per element")
    clean(axes)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    words = "Modelled, not measured. Above a GPU's line a kernel is bound by instructions, below it by bytes"
    figure.suptitle(f"{textwrap.fill(words, 60)}\n{title}", fontsize=FONT - 1)
    return figure
