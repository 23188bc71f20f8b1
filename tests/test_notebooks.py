"""Every notebook holds what running it printed and drew, and nothing of the machine it ran on; make test runs them all."""

from __future__ import annotations

import base64
import json
import re
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


def test_there_are_notebooks_and_the_readme_lists_them() -> None:
    assert NOTEBOOKS
    readme = (ROOT / "README.md").read_text()
    assert [path.name for path in NOTEBOOKS if f"(notebooks/{path.name})" not in readme] == []


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


def test_has_a_picture(notebook: dict[str, Any]) -> None:
    pictures = [o["data"]["image/png"] for o in outputs(notebook) if "image/png" in o.get("data", {})]
    assert pictures
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)


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
