"""Runs a command as if on a GPU: kernels are compiled for sm_90, launches recorded, not made (benchmarks/stub_driver.py).

``python -m tests.rehearsal triton_thresh tune --sizes 10``: no time is taken, no result computed.
"""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import triton.testing

from benchmarks.stub_driver import StubDriver
from triton_thresh import backend, tune, tuning

NAME = "pretended GPU"


@contextmanager
def pretended_gpu() -> Iterator[StubDriver]:
    """CPU tensors go to Triton's launch path, and every candidate of a search is compiled, launched and given a made-up time."""
    times = itertools.cycle((3.0, 1.0, 2.0))

    def bench(function: Callable[[], object], **_: Any) -> float:
        function()
        return next(times)

    with ExitStack() as stack:
        for target, name, value in (
            (tune, "gpu", lambda: torch.device("cpu")),
            (backend, "is_driven", lambda device: True),
            (tuning, "device_name", lambda device: NAME),
            (tuning, "lanes", lambda device: 32),
            (triton.testing, "do_bench", bench),
        ):
            stack.enter_context(patch.object(target, name, value))
        yield stack.enter_context(StubDriver())


def main() -> int:
    module, *arguments = sys.argv[1:]
    with pretended_gpu() as driver:
        code = int(importlib.import_module(f"{module}.__main__").main(arguments))
        print(f"rehearsal: {len(driver.launches)} launches recorded, none made")
    return code


if __name__ == "__main__":
    sys.exit(main())
