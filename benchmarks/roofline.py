"""What bounds a kernel on a named GPU, from its machine code alone: modelled, not measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from benchmarks.plots import clean


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
        """Of one lane each: SMs x 4 schedulers x 32 lanes x clock."""
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


# Okabe and Ito's colours; a marker of its own for each dtype.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = {"fp32": "o", "bf16": "^", "fp16": "s"}
NAMED = 6


def draw(points: Sequence[Point], title: str) -> Figure:
    """Bytes against instructions of an element; left of a GPU's line the bytes take longer, above it the instructions."""
    figure = Figure(figsize=(11, 6.6), layout="constrained")
    axes = figure.subplots()
    right = max(point.bytes for point in points) * 1.12
    top = max(point.instructions for point in points) * 1.1
    for gpu, dashes in zip(GPUS.values(), ("--", "-")):
        label = f"{gpu.name}: {gpu.bytes_per_second / 1e12:g} TB/s,\n{gpu.instructions_per_second / 1e12:.1f}e12 instructions/s"
        axes.plot(
            [0, right],
            [0, gpu.instructions_per_byte * right],
            color="black",
            linewidth=1.2,
            linestyle=dashes,
            label=label,
        )
    groups = list(dict.fromkeys(point.group for point in points))
    for group, color in zip(groups, PALETTE):
        for dtype, marker in MARKERS.items():
            here = [
                (point.bytes, point.instructions) for point in points if (point.group, point.dtype) == (group, dtype)
            ]
            if here:
                axes.plot(
                    *zip(*here),
                    linestyle="none",
                    marker=marker,
                    markersize=7,
                    markerfacecolor="white",
                    markeredgewidth=1.5,
                    color=color,
                    label=f"{group}, {dtype}",
                )
    labelled: list[float] = []
    for point in sorted(points, key=lambda point: -point.instructions / point.bytes):
        if len(labelled) < NAMED and all(abs(point.instructions - y) > top / 30 for y in labelled):
            labelled.append(point.instructions)
            axes.annotate(
                f"{point.name}, {point.dtype}",
                (point.bytes, point.instructions),
                xytext=(9, -3),
                textcoords="offset points",
                fontsize=8.5,
                bbox=dict(facecolor="white", edgecolor="none", alpha=0.85, pad=0.6),
            )
    axes.set(xlim=(0, right), ylim=(0, top), xlabel="bytes an element", ylabel="instructions an element")
    axes.set_title(
        f"Modelled, not measured: above a GPU's line issuing takes longer, below it the bytes do\n{title}", fontsize=10
    )
    clean(axes)
    figure.legend(loc="outside right upper", fontsize=8.5, frameon=False)
    return figure
