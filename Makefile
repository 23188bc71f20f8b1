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
LIGHT := $(VENV)/light
READY := $(VENV)/ready
# pip compiles one module after the other; tests of packages are never imported.
COMPILE := $(BIN)/python -m compileall -q -j 0 -x '/(tests?|pip)/' $(VENV) >/dev/null
PYTEST := $(BIN)/python -m pytest -q
# Several processes, each with one thread.
PYTEST_ON_CPU := OMP_NUM_THREADS=1 $(PYTEST) -n $(JOBS) --dist worksteal
HAS_NBMAKE := $(BIN)/python -c 'import ipykernel, nbmake' 2>/dev/null
HAS_GPU := $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null

.PHONY: help demo test test-kernels test-rest check matrix ptx versions lint gpu-test table docs bench report gpu clean

help:
	@echo "make demo      six short trainings: what each op does, and that it is the formula in torch (ARGS='--steps 100')"
	@echo "make test      every test this machine can run, and the notebooks"
	@echo "make check     a quick subset of the tests"
	@echo "make matrix    what make test runs a share of: products of base, rule, option, dtype, operand, target and compiler"
	@echo "make ptx       the tests of kernels again, by the PTX they compile to, executed on the CPU: an hour or two"
	@echo "make versions  the tests with the oldest and the newest Python, torch and Triton; downloads a torch for each"
	@echo "make lint      ruff and mypy"
	@echo "make gpu-test  the tests that need a GPU, alone"
	@echo "make table     write the README's tables anew from the registry and the results, and its picture"
	@echo "make docs      the documentation site, in site/ (python -m http.server -d site)"
	@echo "make bench     measure every op against eager torch and torch.compile, into bench-results/ (ARGS='--full')"
	@echo "make report    tables and pictures of the newest results"
	@echo "make gpu       everything a GPU settles, in one go: tests, benchmark, sanitizer, profiler, tuning (LIMIT=1800 seconds)"

# make demo needs no more than this. Where $(PYTHON) already has a torch that sees a GPU, that one is used, with whatever else is
# installed beside it. pip would compile 9,000 modules, one after the other; the demo compiles those that it imports.
$(LIGHT): pyproject.toml
	@echo "$(VENV), once: an empty environment (1 of 3)"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/pip install --quiet "pip>=25.1"
	@if $(HAS_GPU); then \
		echo "$(VENV), once: torch is the one of $(PYTHON), which sees a GPU (2 of 3)"; \
		$(PYTHON) -c 'import site; print("\n".join(site.getsitepackages()))' \
			> "$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')/outer.pth"; \
	else \
		echo "$(VENV), once: $(TORCH), by far the largest part (2 of 3)"; \
		$(BIN)/pip install --quiet --no-compile "$(TORCH)" numpy; \
	fi
	@echo "$(VENV), once: scikit-learn, matplotlib and rich (3 of 3)"
	@$(BIN)/pip install --quiet --no-compile --group demo
	@touch $@

# Everything else needs this. An ipykernel found beside a GPU's torch would start that Python; the kernel installed here starts
# this one.
$(READY): $(LIGHT)
	@echo "$(VENV), once: Triton, and the tools to test and to measure with"
	@$(COMPILE) & \
	{ $(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/pip install --quiet --no-compile "$(TRITON)"; } \
	&& $(BIN)/pip install --quiet --no-compile "setuptools>=77" wheel \
	&& { $(BIN)/pip install --quiet --no-compile --no-build-isolation --editable . --group dev \
		|| $(BIN)/pip install --quiet --no-build-isolation --no-deps --editable . \
		|| echo "Not installed, which all that make runs can do without: it runs in this folder."; }; \
	status=$$?; wait; exit $$status
	@$(COMPILE) || true  # some packages ship files for other Pythons
	@if $(HAS_NBMAKE); then $(BIN)/python -m ipykernel install --sys-prefix >/dev/null; fi
	@touch $@

demo: $(LIGHT)
	@$(BIN)/python -m examples.demo $(ARGS)

# Two runs, because Triton reads TRITON_INTERPRET when it is imported: one has the kernels in the interpreter, the other has
# everything else, and on a GPU the kernels too.
test: test-kernels test-rest

test-kernels: $(READY)
	TRITON_INTERPRET=1 $(PYTEST_ON_CPU) tests/kernels tests/interpreted $(ARGS)

test-rest: $(READY)
	@books=; if $(HAS_NBMAKE); then books="--nbmake --nbmake-timeout=240 notebooks"; \
	else echo "The notebooks are not run: nbmake or ipykernel is not installed."; fi; \
	if $(HAS_GPU); then \
		$(PYTEST) $$books tests --ignore=tests/interpreted --doctest-modules triton_thresh $(ARGS); \
	else \
		$(PYTEST_ON_CPU) $$books tests --ignore=tests/interpreted --ignore=tests/kernels \
			--doctest-modules triton_thresh $(ARGS); \
	fi

# Both runs at once, each in one process, because every further process would collect all tests again. Collecting takes a quarter
# of the time.
check: $(READY)
	@$(MAKE) -j2 --no-print-directory $(if $(filter output-sync,$(.FEATURES)),-O) test JOBS=0 ARGS="-m 'not slow'"

gpu-test: $(READY)
	$(PYTEST) -m gpu tests $(ARGS)

matrix: $(READY)
	TRITON_INTERPRET=1 $(PYTEST_ON_CPU) tests/kernels/matrix.py $(ARGS)
	TRITON_INTERPRET=1 $(PYTEST_ON_CPU) --matrix tests/kernels $(ARGS)
	$(PYTEST_ON_CPU) --matrix tests --ignore=tests/interpreted --ignore=tests/kernels $(ARGS)

# First every instruction is exact. Then approximate ones are as wrong as NVIDIA documents, in the tests that execute them.
ptx: $(READY)
	PTX_EVERYTHING=1 $(PYTEST_ON_CPU) tests/ptx $(ARGS)
	$(PYTEST_ON_CPU) -p tests.ptx.plugin tests/kernels tests/gpu/test_accuracy.py $(ARGS)
	for mode in random plus minus; do PTX_APPROXIMATE=$$mode $(PYTEST_ON_CPU) -p tests.ptx.plugin \
		tests/kernels/test_gates.py tests/kernels/test_l*.py tests/kernels/test_options.py \
		tests/gpu/test_accuracy.py $(ARGS) || exit; done

versions:
	$(PYTHON) tests/versions.py $(ARGS)

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

table: $(READY)
	$(BIN)/python -m docs.readme
	$(BIN)/python -m docs.pictures

$(VENV)/docs: $(READY)
	$(BIN)/pip install --quiet --group docs
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
