# Everything that a fresh machine needs to run, try and test the backend; needs Python 3.11 or newer.

PYTHON ?= python3
VENV := .venv
LABEL_STUDIO_VENV := .venv-label-studio
LABEL_STUDIO_VERSION := 1.23.2
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check --quiet

.PHONY: run demo check test lint clean

run: $(VENV)/.installed ## serve on http://127.0.0.1:9090
	$(VENV)/bin/ml-backend serve

demo: $(VENV)/.installed $(LABEL_STUDIO_VENV)/.installed ## Label Studio and the backend, with a generated project
	$(VENV)/bin/python -m ml_backend.demo --label-studio $(LABEL_STUDIO_VENV)/bin/label-studio

# Each process of pytest computes with one thread: two processes that both use every core slow each
# other down by far more than a factor of two.
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile

check: $(VENV)/.installed-dev lint ## what one runs while working: no Label Studio, no server, no long training
	$(PYTEST) -m "not label_studio and not server and not slow" --durations=15 --durations-min=5

test: $(VENV)/.installed-dev $(LABEL_STUDIO_VENV)/.installed lint ## everything, against a real Label Studio
	$(PYTEST)

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(PIP) install --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(PIP) install --editable ".[dev]"
	@touch $@ $(VENV)/.installed

$(LABEL_STUDIO_VENV)/.installed:
	$(PYTHON) -m venv $(LABEL_STUDIO_VENV)
	$(LABEL_STUDIO_VENV)/bin/python -m pip --disable-pip-version-check --quiet install label-studio==$(LABEL_STUDIO_VERSION)
	@touch $@

clean: ## forget the environments
	rm -rf $(VENV) $(LABEL_STUDIO_VENV)
