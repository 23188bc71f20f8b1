"""Compiles every kernel for GPUs that the compile report leaves out, by ``python -m docs.hardware [TARGET ...]``.

For each target, or those named, it counts the kernels, and those of them that spill. A kernel that does not compile stops it;
the targets before it are kept.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget

from benchmarks import aot, cases, compiled, records

RESULT = Path(__file__).parents[1] / "benchmarks" / "results" / "targets.json"
OTHERS = {f"sm_{capability}": GPUTarget("cuda", capability, 32) for capability in (75, 86, 89, 120)}


def main(targets: list[str]) -> None:
    aot.TARGETS.update(OTHERS)
    found = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    for target in targets or OTHERS:
        reports = [compiled.compile_case(case, target) for case in cases.cases(("fp32", "bf16"), 32)]
        spills = sum(bool(report.spills) for report in reports)
        by = {"triton": triton.__version__, "commit": records.commit()}
        found[target] = {"kernels": len(reports), "spills": spills, **by}
        print(target, found[target], flush=True)
        RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
