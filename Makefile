# make demo and make test need Python 3.10 or newer and the internet; each makes its own .venv.
PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.6.0
JOBS ?= 2
ARGS ?=
LIMIT ?= 1800
OUT ?= gpu-results

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
HAS_NBMAKE := $(BIN)/python -c 'import ipykernel, nbmake' 2>/dev/null
HAS_GPU := $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null

.PHONY: help demo test check lint gpu-test table docs bench report gpu clean

help:
	@echo "make demo      six short trainings, the pack against the same formulas in torch (ARGS='--steps 100')"
	@echo "make test      every test this machine can run, and the notebooks"
	@echo "make check     a quick subset of the tests"
	@echo "make lint      ruff and mypy"
	@echo "make gpu-test  the tests that need a GPU, alone"
	@echo "make table     write the README's op table anew from the registry"
	@echo "make docs      the documentation site, in site/ (python -m http.server -d site)"
	@echo "make bench     measure every op against eager torch and torch.compile, into bench-results/ (ARGS='--full')"
	@echo "make report    tables and pictures of the newest results"
	@echo "make gpu       everything a GPU settles, in one go: tests, benchmark, sanitizer, profiler, tuning (LIMIT=1800 seconds)"

# Where $(PYTHON) already has a torch that sees a GPU, that one is used, with whatever else is installed beside it. An ipykernel
# found there would start that Python; the kernel installed here starts this one.
$(READY): pyproject.toml
	$(PYTHON) -m venv --clear $(VENV)
	@if $(HAS_GPU); then \
		$(PYTHON) -c 'import site; print("\n".join(site.getsitepackages()))' \
			> "$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')/outer.pth"; \
	else \
		$(BIN)/pip install --quiet "$(TORCH)" numpy && \
		{ $(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/pip install --quiet "$(TRITON)"; } \
	fi
	$(BIN)/pip install --quiet "setuptools>=64" wheel
	$(BIN)/pip install --quiet --no-build-isolation --editable '.[dev]' \
		|| $(BIN)/pip install --quiet --no-build-isolation --no-deps --editable .
	@if $(HAS_NBMAKE); then $(BIN)/python -m ipykernel install --sys-prefix >/dev/null; fi
	@touch $@

demo: $(READY)
	$(BIN)/python -m triton_thresh demo $(ARGS)

# Two processes, since Triton reads TRITON_INTERPRET when it is imported: the kernels in the interpreter; everything else,
# on a GPU the kernels too.
test: $(READY)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal tests/kernels tests/interpreted $(ARGS)
	@books=; if $(HAS_NBMAKE); then books="--nbmake --nbmake-timeout=240 notebooks"; \
	else echo "The notebooks are not run: nbmake or ipykernel is not installed."; fi; \
	if $(HAS_GPU); then \
		$(BIN)/python -m pytest -q $$books tests --ignore=tests/interpreted --doctest-modules triton_thresh $(ARGS); \
	else \
		OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal $$books tests --ignore=tests/interpreted \
			--ignore=tests/kernels --doctest-modules triton_thresh $(ARGS); \
	fi

check: $(READY)
	$(MAKE) test ARGS="-m 'not slow'"

gpu-test: $(READY)
	$(BIN)/python -m pytest -q -m gpu tests $(ARGS)

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

table: $(READY)
	$(BIN)/python -m triton_thresh ops --write README.md

$(VENV)/docs: $(READY)
	$(BIN)/pip install --quiet --no-build-isolation --editable '.[docs]'
	@touch $@

docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

bench: $(READY)
	$(BIN)/python -m benchmarks run $(ARGS)

report: $(READY)
	$(BIN)/python -m benchmarks report $(ARGS)

gpu: $(READY)
	$(BIN)/python -m benchmarks gpu --limit $(LIMIT) --out $(OUT) $(ARGS)

clean:
	rm -rf $(VENV) build dist site *.egg-info
