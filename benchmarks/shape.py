"""The shape of the code: its lines, the floors of its imports, and the files that a call walks through.

``python -m benchmarks.shape`` prints it. A module stands one floor above the highest one that it imports.
"""

from __future__ import annotations

import ast
import itertools
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "triton_thresh"


def lines() -> dict[str, int]:
    """The lines of each file of the package and its kernels."""
    files = [*sorted(PACKAGE.glob("*.py")), *sorted((ROOT / "kernels").glob("*.py"))]
    return {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}


def imports() -> dict[str, set[str]]:
    """The modules of the package that each imports, at its top or inside a function, but not for types alone."""
    names = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__", "kernels"}
    return {name: _imported(ast.parse((PACKAGE / f"{name}.py").read_text()), names) for name in names}


def _imported(tree: ast.AST, names: set[str]) -> set[str]:
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
        found |= _imported(node, names)
    return found & names


def floors(imported: Mapping[str, set[str]]) -> dict[str, int]:
    """The floor of each module, from 1. A circle of imports is an error that names its modules."""
    found: dict[str, int] = {}
    while len(found) < len(imported):
        ready = {name for name, below in imported.items() if name not in found and below <= found.keys()}
        if not ready:
            raise ValueError(f"a circle of imports among {sorted(imported.keys() - found.keys())}")
        found |= {name: 1 + max((found[each] for each in imported[name]), default=0) for name in ready}
    return found


def walk(call: Callable[[], Any]) -> list[str]:
    """The file of every Python function of the package, in order, that a call enters the third time."""
    entered: list[str] = []

    def see(frame: Any, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.parent == PACKAGE:
            entered.append(path.stem)

    call()
    call()
    sys.setprofile(see)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entered


def walks() -> dict[str, tuple[int, int, int]]:
    """Of calls on the Triton path: functions entered, files, and changes of file. Needs TRITON_INTERPRET=1 without a GPU."""
    import torch

    import triton_thresh as tt

    x, y = torch.randn(64), torch.rand(64)
    learns = x.clone().requires_grad_()
    calls = {
        "hardshrink, forward": lambda: tt.hardshrink(x, 0.5),
        "hardshrink, forward and backward": lambda: tt.hardshrink(learns, 0.5).sum().backward(),
        "threshold_bce_with_logits_loss, forward and backward": lambda: tt.threshold_bce_with_logits_loss(
            learns, y, 0.7
        ).backward(),
    }
    found = {}
    with tt.use_backend("triton"):
        for name, call in calls.items():
            files = walk(call)
            found[name] = len(files), len(set(files)), sum(a != b for a, b in itertools.pairwise(files))
    return found


def main() -> None:
    counted = lines()
    own = sum(n for name, n in counted.items() if name.startswith("triton_thresh"))
    print(f"lines: {sum(counted.values()):,}, {own:,} in triton_thresh, {sum(counted.values()) - own:,} in kernels")
    found = floors(imports())
    for floor in range(1, max(found.values()) + 1):
        print(f"floor {floor}: {', '.join(sorted(name for name, at in found.items() if at == floor))}")
    print("no circle of imports")
    os.environ.setdefault("TRITON_INTERPRET", "1")
    for name, (functions, files, changes) in walks().items():
        print(f"{name}: {functions} calls, {files} files, {changes} changes of file")


if __name__ == "__main__":
    main()
