# Two commands do everything: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# uv installs the same wheels as pip, about eight times faster.
INSTALL := $(BIN)/uv pip install --quiet --python $(BIN)/python

.PHONY: demo test lint wheel docs clean

demo: $(VENV)/.ready
	$(BIN)/kelp demo --output_dir demo

test: lint wheel
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.ready-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The wheel, installed into an empty environment, does the whole job.
wheel: $(VENV)/.ready-dev
	rm -rf dist build/wheel
	$(BIN)/python -m build --wheel --installer uv --outdir dist .
	$(PYTHON) -m venv build/wheel
	$(BIN)/uv pip install --quiet --python build/wheel/bin/python dist/*.whl
	KELP_BIN=build/wheel/bin $(BIN)/python -m pytest tests/test_seed.py -k program

docs: $(VENV)/.ready-dev
	$(INSTALL) --editable ".[docs]"
	$(BIN)/mkdocs build --strict

# The environment is made anew only when the dependencies change.
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(INSTALL) --editable ".[geo,series]"
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(INSTALL) --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) demo dist build site
