"""make versions: the tests that depend on Python, torch and Triton, with the oldest and the newest of them, into versions.json.

The oldest Python found here runs the oldest torch that pyproject.toml allows, every other one the newest that pip finds; each
with the Triton that this torch asks for. The table in the documentation is made from versions.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).with_suffix(".json")
# Tests of what only the repository has, and of the build, are the same with every torch.
LEFT_OUT = [
    "test_benchmarks.py",
    "test_demo.py",
    "test_docs.py",
    "test_documentation.py",
    "test_notebooks.py",
    "test_package.py",
]
LEFT_OUT += ["gpu", "interpreted", "kernels"]
PARTS = {"interpreter": ["tests/kernels"], "eager": ["tests", *(f"--ignore=tests/{name}" for name in LEFT_OUT)]}
LIBRARY = re.compile(r"lib(cu|nv|nccl)")
FUNCTION = re.compile(r"_*(cu[A-Z]|cu[a-z]+[A-Z]|nccl|nv)")
REQUIREMENTS = "import importlib.metadata as m; print(*m.requires('torch'), sep='\\n')"
VERSIONS = """
import importlib.metadata as m, json, platform
found = {name: m.version(name).partition("+")[0] for name in ("torch", "triton")}
print(json.dumps({"python": platform.python_version(), **found, "platform": f"{platform.system()} {platform.machine()}"}))
"""


def output(*command: str | Path, **options: Any) -> str:
    done = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True, **options)
    return str(done.stdout)


def pythons() -> list[Path]:
    """Interpreters from 3.10 on, oldest first, one for each minor version."""
    places = [Path(path) for minor in range(10, 30) if (path := shutil.which(f"python3.{minor}"))]
    places += [Path(sys.executable), *Path.home().glob(".pyenv/versions/3.*/bin/python")]
    found: dict[int, Path] = {}
    for place in places:
        try:
            minor = int(output(place, "-c", "import sys; print(sys.version_info.minor)", stderr=subprocess.DEVNULL))
        except (OSError, subprocess.CalledProcessError):  # pyenv has shims of versions that are not switched on
            continue
        found.setdefault(minor, place)
    return [found[minor] for minor in sorted(found) if minor >= 10]


def floor() -> str:
    """The oldest torch that the package allows."""
    (version,) = re.findall(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return f"torch=={version}.*"


def stand_in(libraries: Path) -> None:
    """Compile empty libraries for those of CUDA, without which torch's CUDA build does not load.

    Each function returns 100, CUDA's code for "no device": torch then says that there is none, and the tests run on the CPU.
    """
    needed: set[str] = set()
    asked: dict[str, set[str]] = {}  # of a library: the versions of its symbols
    functions: set[tuple[str, str]] = set()  # with the version, or ""
    for file in libraries.glob("*.so*"):
        needed |= set(re.findall(r"NEEDED.*\[(.+)\]", output("readelf", "-d", file)))
        for section in output("readelf", "-VW", file).split("File: ")[1:]:
            asked.setdefault(section.split()[0], set()).update(re.findall(r"Name: (\S+)", section))
        for symbol in re.findall(r" U (\S+)", output("nm", "-D", file)):
            if FUNCTION.match(symbol):
                name, _, version = symbol.partition("@")
                functions.add((name, version))
    code = "\n".join(f"int {name}(void) {{ return 100; }}" for name in sorted({name for name, _ in functions}))
    with tempfile.TemporaryDirectory() as folder:
        source, script = Path(folder, "source.c"), Path(folder, "script")
        source.write_text(code)
        for library in filter(LIBRARY.match, needed):
            exports = {v: " ".join(f"{name};" for name, of in functions if of == v) for v in asked.get(library, ())}
            script.write_text("".join(f"{version} {{ global: {names} }};\n" for version, names in exports.items()))
            options = (
                "-w",
                "-shared",
                "-fPIC",
                f"-Wl,-soname,{library}",
                *([f"-Wl,--version-script={script}"] if exports else []),
            )
            output("gcc", *options, "-o", libraries / library, source)


def environment(python: Path, torch: str, folder: Path) -> Path:
    """An interpreter with this torch, what it needs save CUDA's libraries, and what the tests need."""
    output(python, "-m", "venv", folder)
    own = folder / "bin" / "python"
    pip = (own, "-m", "pip", "install", "-q", "--disable-pip-version-check")
    output(*pip, "pip>=25.1")
    output(*pip, "--no-deps", torch)
    needs = [
        line for line in output(own, "-c", REQUIREMENTS).splitlines() if not re.match("nvidia|cuda|.*extra ==", line)
    ]
    output(*pip, *needs, "--group", f"{ROOT}/pyproject.toml:smoke")
    if subprocess.run([own, "-c", "import torch"], stderr=subprocess.DEVNULL, check=False).returncode:
        stand_in(next(folder.glob("lib/python*/site-packages/torch/lib")))
        output(own, "-c", "import torch")
    return own


def tested(python: Path, part: str, folder: Path) -> tuple[int, list[str]]:
    """How many tests passed, and the names of those that did not."""
    report = folder / f"{part}.xml"
    variables = {"OMP_NUM_THREADS": "1", **({"TRITON_INTERPRET": "1"} if part == "interpreter" else {})}
    options = ["-q", "-p", "no:cacheprovider", "--show-capture=no", "--continue-on-collection-errors"]
    options += ["-m", "not slow", f"--junitxml={report}"]
    with (folder / f"{part}.log").open("w") as log:
        subprocess.run(
            [python, "-m", "pytest", *options, *PARTS[part]],
            cwd=ROOT,
            env={**os.environ, **variables},
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    return len(cases) - len(failed) - len(skipped), [f"{case.get('classname')}::{case.get('name')}" for case in failed]


def tried(python: Path, torch: str, folder: Path) -> dict[str, Any]:
    """What one environment gave."""
    own = environment(python, torch, folder)
    found = json.loads(output(own, "-c", VERSIONS))
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(lambda part: tested(own, part, folder), PARTS))
    commit = output("git", "-C", ROOT, "rev-parse", "--short", "HEAD").strip()
    passed, failed = sum(count for count, _ in results), [name for _, names in results for name in names]
    return {**found, "commit": commit, "passed": passed, "failed": failed}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", metavar="3.N", help="this Python alone; the rows of the others stay as they are")
    parser.add_argument("--torch", help="with this torch, a requirement, instead; nothing is written")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="leave the environments there, with what pytest said"
    )
    args = parser.parse_args()
    rows = json.loads(RESULT.read_text()) if RESULT.exists() else []
    for place, python in enumerate(pythons()):
        minor = output(python, "-c", "import sys; print('3.%d' % sys.version_info.minor)").strip()
        if args.only not in (None, minor):
            continue
        with tempfile.TemporaryDirectory() as temporary:
            folder = args.keep or Path(temporary)
            found = tried(python, args.torch or ("torch" if place else floor()), folder / minor)
        print(json.dumps(found, indent=1), flush=True)
        rows = [row for row in rows if not row["python"].startswith(f"{minor}.")] + [found]
        rows.sort(key=lambda row: [int(part) for part in row["python"].split(".")])
        if not args.torch:
            RESULT.write_text(json.dumps(rows, indent=1) + "\n")
    return any(row["failed"] for row in rows)


if __name__ == "__main__":
    sys.exit(main())
