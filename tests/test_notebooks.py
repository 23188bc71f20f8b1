"""Every notebook holds what running it printed and drew, and nothing of the machine it ran on; make test runs them all.

Their trainings are then as short as the metadata of the cell that imports STEPS says, which is for nbmake alone.
"""

from __future__ import annotations

import base64
import json
import re
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PLACE = re.compile(r"(?<![\w.])/(home|root|tmp|Users|opt|usr|var|mnt|work)/|[A-Z]:\\\\|site-packages")

Cell = dict[str, Any]


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request: pytest.FixtureRequest) -> dict[str, Any]:
    return json.loads(request.param.read_text())


def code(notebook: dict[str, Any]) -> list[Cell]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def outputs(notebook: dict[str, Any]) -> list[Cell]:
    return [output for cell in code(notebook) for output in cell["outputs"]]


def source(cell: Cell) -> str:
    return "".join(cell["source"])


def test_the_first_one_is_short_and_lists_the_others() -> None:
    first, *others = NOTEBOOKS
    cells = json.loads(first.read_text())["cells"]
    assert len([line for line in source(code({"cells": cells})[0]).splitlines() if line]) <= 10
    listed = "\n".join(map(source, cells))
    assert [path.name for path in others if f"({path.name})" not in listed] == []
    assert "(notebooks" in (ROOT / "README.md").read_text()


def test_cells_can_be_read_at_a_glance(notebook: dict[str, Any]) -> None:
    """What draws is in notebooks/plots.py."""
    assert [len(source(cell).splitlines()) for cell in code(notebook) if len(source(cell).splitlines()) > 25] == []
    assert re.findall(r"matplotlib|\bplt\b", "\n".join(map(source, code(notebook)))) == []


def test_starts_with_a_title(notebook: dict[str, Any]) -> None:
    first = notebook["cells"][0]
    assert first["cell_type"] == "markdown"
    assert "".join(first["source"]).startswith("# ")


def test_was_run_in_order_from_a_fresh_kernel(notebook: dict[str, Any]) -> None:
    counts = [cell["execution_count"] for cell in code(notebook)]
    assert counts == list(range(1, len(counts) + 1))


def test_ran_without_errors_and_warnings(notebook: dict[str, Any]) -> None:
    loud = [o for o in outputs(notebook) if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert loud == []


def pixels_a_metre(png: bytes) -> int:
    """From the chunk pHYs: pixels along x, along y, and the unit, 1 for metres."""
    x, y, unit = struct.unpack_from(">IIB", png, png.index(b"pHYs") + 4)
    assert (x, unit) == (y, 1)
    return int(x)


def test_has_pictures_of_150_dots_an_inch(notebook: dict[str, Any]) -> None:
    pictures = [o["data"]["image/png"] for o in outputs(notebook) if "image/png" in o.get("data", {})]
    assert pictures
    decoded = [base64.b64decode(picture) for picture in pictures]
    assert all(png.startswith(b"\x89PNG") for png in decoded)
    assert [round(0.0254 * pixels_a_metre(png)) for png in decoded] == [150] * len(decoded)


def test_names_no_place_on_a_machine(notebook: dict[str, Any]) -> None:
    for output in outputs(notebook):
        output.get("data", {}).pop("image/png", None)
    found = PLACE.search(json.dumps(notebook))
    assert found is None, found
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"


def test_the_kernel_is_this_python() -> None:
    reason = "nbmake is not installed, so the notebooks are not run"
    pytest.importorskip("nbmake", reason=reason)
    manager = pytest.importorskip("jupyter_client.manager", reason=reason)
    started = manager.KernelManager(kernel_name="python3").format_kernel_cmd()[0]
    assert Path(started).parent == Path(sys.executable).parent
