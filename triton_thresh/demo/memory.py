"""The peak of what a call allocates."""

import json
import os
import tempfile
from collections.abc import Callable
from itertools import accumulate
from operator import itemgetter
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most memory torch held on the device during the call, beyond what it held before."""
    return _on_gpu(call) if device.type == "cuda" else _on_cpu(call)


def _on_gpu(call: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held


def _on_cpu(call: Callable[[], object]) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # two lines on stderr per profile otherwise
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiled.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = [(e["ts"], int(e["args"]["Bytes"])) for e in events if e["name"] == "[memory]"]
    changes.sort(key=itemgetter(0))
    return max(accumulate((change for _, change in changes), initial=0))
