# `make demo` and `make test` do everything, `make check` what is quick. All set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# uv installs the same wheels as pip, about eight times faster.
INSTALL := $(BIN)/uv pip install --quiet --python $(BIN)/python
FAST := tests/test_layers.py tests/test_docs.py tests/test_cli.py tests/tiling/test_grid.py \
	tests/tiling/test_merge.py tests/evaluation tests/raster/test_raster.py tests/raster/test_indices.py \
	tests/data_prep/test_slicing.py tests/plotting/test_html.py

.PHONY: demo check test lint wheel docs qgis clean

demo: $(VENV)/.ready
	$(BIN)/kelp demo --output_dir demo

test: lint wheel
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Before a commit: format, lint, types, and the tests of what needs no network and no process.
check: lint
	$(BIN)/python -m pytest -q -m "not slow" $(FAST)

lint: $(VENV)/.ready-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The wheel, installed into empty environments, does the whole job, and alone the plain one.
wheel: $(VENV)/.ready-dev
	rm -rf dist build/wheel build/plain
	$(BIN)/python -m build --wheel --installer uv --outdir dist .
	$(PYTHON) -m venv build/wheel
	$(BIN)/uv pip install --quiet --python build/wheel/bin/python "$$(echo dist/*.whl)[train]"
	KELP_BIN=build/wheel/bin $(BIN)/python -m pytest tests/test_seed.py -k program
	$(PYTHON) -m venv --without-pip build/plain
	$(BIN)/uv pip install --quiet --python build/plain/bin/python dist/*.whl
	KELP_BIN=build/plain/bin $(BIN)/python -m pytest tests/test_plain.py

docs: $(VENV)/.ready-dev
	$(INSTALL) --editable ".[docs]"
	$(BIN)/mkdocs build --strict

# The environment is rebuilt only when the dependencies change.
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(INSTALL) --editable ".[train,geo,series]"
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(INSTALL) --editable ".[dev]"
	touch $@

# Debian's QGIS runs the provider; its own job, it needs root and 1 GB.
qgis: $(VENV)/.ready-dev
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends qgis python3-qgis
	KELP_QGIS=1 $(BIN)/python -m pytest tests/qgis

clean:
	rm -rf $(VENV) demo dist build site
