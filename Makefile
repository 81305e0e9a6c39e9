# Every target sets up .venv from nothing and reuses it after. `demo` installs no torch; the others add what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
CORE := $(VENV)/.core
FULL := $(VENV)/.full

.PHONY: demo test lint parity bench bindings-check install-check model clean

demo: $(CORE)
	$(BIN)/fewstep demo

test: $(FULL)
	$(BIN)/python -m pytest

parity: $(FULL)
	FEWSTEP_PARITY=full $(BIN)/python -m pytest tests/schedules/test_parity.py -s

lint: $(FULL)
	$(BIN)/ruff check .
	@mkdir -p build/mypy && ln -sfn ../.. build/mypy/fewstep
	MYPYPATH=build/mypy $(BIN)/mypy

bench: $(FULL)
	$(BIN)/python bench/startup.py
	$(BIN)/python bench/samplers.py

# The oldest and newest TensorRT whose calls are checked; their wheels hold the bindings alone, 1 MB each.
bindings-check: $(FULL)
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest build/bindings tensorrt-cu13-bindings==11.4.0.106
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest build/bindings tensorrt-cu12-bindings==10.16.1.11
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest build/bindings tensorrt-cu12-bindings==10.12.0.36
	$(BIN)/python -m pytest tests/engines/test_bindings.py

install-check: $(FULL)
	$(BIN)/python tools/check_install.py

$(CORE): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(0 if sys.version_info >= (3, 11) else 'fewstep needs Python 3.11 or later: make PYTHON=python3.11')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[cpu]'
	@touch $@

# torch first and by its exact version: a range could pull a build with gigabytes of CUDA libraries.
$(FULL): $(CORE)
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[cpu,serve,export,verify,tensorrt-rtx,plot,dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
