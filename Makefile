# make help lists the targets. A bare machine needs Python >= 3.10 and make, nothing else.
#
#   PYTHON=python3.12   the interpreter that .venv is made with
#   VENV=path           use an existing environment: keep what it has, add what is missing
#   ARGS="..."          passed on to the program that a target runs

SHELL := bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
CONSTRAINTS ?= constraints.txt

BIN := $(VENV)/bin
# This file marks an environment that we created: its packages may be pinned. Nothing is replaced in
# an environment without it.
OURS := $(VENV)/.made-by-fusedrnn
STAMP := $(VENV)/.fusedrnn
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check
PINS = $$(test -e $(OURS) && echo "-c $(CONSTRAINTS)")
# The fusedrnn that an existing environment has from elsewhere, if any. It stays: the demo runs it
# and says so; targets that test this checkout stop. (-I looks past this folder.)
THEIRS = $$(test -e $(OURS) || $(BIN)/python -I -c "import importlib.util, os; \
  s = importlib.util.find_spec('fusedrnn'); \
  s and not os.path.samefile(s.origin, 'fusedrnn/__init__.py') and print(s.origin)")
PROJECT := $(CONSTRAINTS) pyproject.toml setup.py

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv aot step-cost demo test check check-tests oldest oldest-venv oldest-tests gpu-test lint wheel \
	format clean bench bench-cpu bench-gpu bench-tiny report

help:  ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 16

venv: $(STAMP)-base  ## An environment with the package installed

demo: $(STAMP)-demo  ## Train a character model with torch.nn and with fusedrnn, about a minute
	$(BIN)/python examples/char_lm.py $(ARGS)

# One thread per worker: two workers with two threads each would fight over two cores. tests/gpu
# is not even collected: it imports Triton before the kernel tests switch its interpreter on.
PYTEST = OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m pytest -p per_file -n 2 \
  --dist worksteal -m "not gpu" --ignore tests/gpu
test: $(STAMP)-test  ## The tests that need no GPU
	$(PYTEST) $(ARGS)

# `make test` has the rest: what compiles, exports, draws cases by the hundred or starts processes.
# Nothing has to be added to these two lists: a new file or test is checked until it is left out.
SLOW_FILES := autocast convert beyond_derivatives beyond_examples beyond_export beyond_regularizers \
  beyond_robustness beyond_states compile demo dropin_hypothesis main module_db onnx opacus \
  packaging third_party
FAST := not compile and not graph and not meta_device and not environment
check: $(STAMP)-lint $(STAMP)-test  ## make lint and the fast tests, a minute on two cores: for every edit
	@$(MAKE) --no-print-directory -j 2 --output-sync lint check-tests

check-tests:
	$(PYTEST) -k "$(FAST)" --durations 5 \
	  $(filter-out $(SLOW_FILES:%=tests/test_%.py),$(wildcard tests/test_*.py)) $(ARGS)

gpu-test: $(STAMP)-test  ## The tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu tests/gpu $(ARGS)

# On a CPU one thread's CPU time, which other programs disturb least; ARGS="--threads N" takes the
# wall time of N threads.
bench: $(STAMP)-bench  ## A quick measurement of this machine, with table and pictures, in out/bench/
	$(BIN)/python -m bench.run --quick --budget 120 --out out/bench/quick/quick.json $(ARGS)
	$(BIN)/python -m bench.overhead --out out/bench/quick/quick.json
	$(BIN)/python -m bench.report --results out/bench --out out/bench --show

# A second time with the instructions that nearly every CPU has: other kernels of torch run then.
bench-cpu: $(STAMP)-bench  ## What lengths, resets, ... cost on this CPU beside their goals, in out/cpu/
	rm -f out/cpu/cpu/plain.json out/cpu/cpu/avx2.json
	$(BIN)/python -m bench.cpu --out out/cpu/cpu/plain.json $(ARGS)
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 TORCHINDUCTOR_CACHE_DIR=out/cpu/inductor \
	  $(BIN)/python -m bench.cpu --out out/cpu/cpu/avx2.json $(ARGS)
	$(BIN)/python -m bench.report --results out/cpu --out out/cpu

# Cut short, it leaves what it has; ARGS="--resume bench/results/<gpu>/<file>" goes on from there.
bench-gpu: $(STAMP)-bench  ## The full run on a GPU into bench/results/, and the report
	$(BIN)/python -m bench.run --device cuda $(ARGS)
	$(BIN)/python -m bench.report --show

bench-tiny: $(STAMP)-bench  ## Every kind of benchmark once at a tiny size: none may rot
	$(BIN)/python -m bench.run --plan tiny --device cpu --out out/tiny/tiny/tiny.json $(ARGS)
	$(BIN)/python -m bench.overhead --repeats 3 --out out/tiny/tiny/tiny.json
	rm -f out/tiny/tiny/cpu.json
	$(BIN)/python -m bench.cpu --tiny --budget 5 --out out/tiny/tiny/cpu.json
	$(BIN)/python -m bench.report --results out/tiny --out out/tiny

# Each version of Triton in a folder of its own, in front of the environment's.
AOT_TRITON ?= 3.7.1 3.6.0 3.9.0
aot: $(STAMP)-bench  ## Compile what the plans choose with three Tritons, one page each; resumes
	@for version in $(AOT_TRITON); do \
	  folder=out/triton-$$version; \
	  test -e $$folder/triton || \
	    $(PIP) install --no-deps --target $$folder triton==$$version || exit 1; \
	  PYTHONPATH=$$folder $(BIN)/python -m bench.aot $(ARGS) || failed=1; \
	done; exit $${failed:-0}

step-cost: $(STAMP)-bench  ## What a step costs by its machine code: ARGS="--cell gru --hidden 512"
	$(BIN)/python -m bench.step_cost $(ARGS)

report: $(STAMP)-bench  ## bench/REPORT.md and README's figures from bench/results/
	$(BIN)/python -m bench.report $(ARGS)

# The first of these interpreters that runs; pyenv's python3.10 does so only where it is chosen.
OLDEST_PYTHON ?= $(shell for p in python3.10 $$HOME/.pyenv/versions/3.10.*/bin/python $(PYTHON); do \
  $$p -c 'import sys; print(sys.executable)' 2>/dev/null && break; done)
OLDEST := .venv-oldest
OLDEST_PINS := build/constraints-oldest.txt
OLDEST_TESTS := $(addprefix tests/,test_cells.py test_reference.py::test_layer test_functional.py test_types.py \
  test_modules.py test_replace.py test_beyond_streaming.py test_compile.py::test_lengths \
  test_compile.py::test_export test_compile.py::test_one_graph_for_every_shape)
OLDEST_KERNEL_TESTS := $(addprefix tests/kernels/test_scan.py::,test_every_cell test_half_precision)

$(OLDEST_PINS): constraints-oldest.txt constraints.txt
	@mkdir -p $(@D)
	@{ cat $<; grep -vE "^($$(sed -n 's/==.*//p' $< | paste -sd '|'))==" constraints.txt; } > $@

oldest-venv: $(OLDEST_PINS)
	@$(MAKE) --no-print-directory venv VENV=$(OLDEST) CONSTRAINTS=$< PYTHON=$(OLDEST_PYTHON)
	@$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $< \
	  pytest pytest-xdist hypothesis expecttest numpy

oldest: oldest-venv  ## The main tests with the oldest torch, Triton, NumPy and Python claimed
	@version=$$($(OLDEST)/bin/python --version); echo "$$version"; case "$$version" in \
	  "Python 3.10."*) ;; *) echo "note: there is no Python 3.10 here, so it is not tested" ;; esac
	$(MAKE) --no-print-directory oldest-tests VENV=$(OLDEST)

oldest-tests:
	$(PYTEST) $(OLDEST_TESTS) $(ARGS)
	$(PYTEST) $(OLDEST_KERNEL_TESTS) $(ARGS)

lint: $(STAMP)-lint $(STAMP)-test  ## ruff (rules and format) and pyright (types)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/types && mkdir -p build/types
	cp -r fusedrnn build/types/ && cp -r kernels build/types/fusedrnn/
	cp tests/typed_program.py build/types/
	$(BIN)/pyright --pythonpath $(BIN)/python | \
	  sed -E 's,build/types/typed,tests/typed,; s,build/types/(fusedrnn/(kernels/))?,\2,'
	PATH="$(abspath $(BIN)):$$PATH" PYTHONPATH=build/types \
	  pyright --verifytypes fusedrnn --ignoreexternal | grep -E "error:|score"

# Built from what is committed, the wheel from the unpacked sdist; the tests of a wheel look at it.
wheel: $(STAMP)-test  ## The sdist and the wheel of HEAD in dist/, checked; see CONTRIBUTING.md
	rm -rf build/release dist && mkdir -p build/release dist
	git archive HEAD | tar -x -C build/release
	cd build/release && $(abspath $(BIN))/python -c \
	  "from setuptools import build_meta; build_meta.build_sdist('$(CURDIR)/dist')" > build.log
	$(BIN)/python -m pip wheel --quiet --no-index --no-build-isolation --no-deps -w dist dist/*.tar.gz
	FUSEDRNN_WHEEL=$$(ls dist/*.whl) PYTHONPATH=tests $(BIN)/python -m pytest -q \
	  tests/test_packaging.py -k wheel
	@ls dist

format: $(STAMP)-lint  ## Rewrite the source as ruff formats it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove .venv and everything that was built
	rm -rf .venv $(OLDEST) build dist out *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and \
	  f"fusedrnn needs Python >= 3.10, {sys.executable} is {v[0]}.{v[1]}; try make PYTHON=...")'
	@echo "making $(VENV) with $$($(PYTHON) --version), installing the versions of $(CONSTRAINTS)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "python -m venv failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@touch $(OURS)

# torch comes first and alone, so that a build for the CPU is taken where an index offers one
# (2.13.0+cpu satisfies ==2.13.0); the steps after it find it installed and leave it.
$(STAMP)-base: $(PROJECT) | $(BIN)/python
	@test ! -e $(OURS) && $(BIN)/python -c "import torch" 2>/dev/null \
	  || { echo "installing torch"; $(PIP) torch==$$(sed -n 's/^torch==//p' $(CONSTRAINTS)); }
	@theirs=$(THEIRS); if test -n "$$theirs"; then \
	  echo "$(VENV) has a fusedrnn, which stays and which the demo runs: $$theirs"; \
	else \
	  echo "installing triton and fusedrnn"; \
	  $(PIP) $(PINS) "setuptools>=77" wheel && \
	  $(PIP) $(PINS) --no-build-isolation -e ".[triton]" && \
	  touch $@; \
	fi

$(STAMP)-%: $(STAMP)-base
	@echo "installing what '$*' needs"
	@theirs=$(THEIRS); if test -z "$$theirs"; then \
	  $(PIP) $(PINS) --no-build-isolation -e ".[$*]" && touch $@; \
	elif test $* = demo; then \
	  $(PIP) "fusedrnn[demo]"; \
	else \
	  echo "$(VENV) has another fusedrnn, $$theirs: uninstall it there, or take another VENV" >&2; \
	  exit 1; \
	fi
