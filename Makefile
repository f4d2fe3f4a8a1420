# Everything runs in a virtual environment inside the checkout, made on first use and again when its inputs change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.graphopt-installed
# Two test workers, one thread each: more threads than cores slow every kernel down.
JOBS ?= 2
# With it every process, and the tests start dozens, compiles torch's Python sources again, which takes five seconds.
unexport PYTHONDONTWRITEBYTECODE

PAGE := graphopt/diff/page
LAYOUT := $(PAGE)/vendor/elk-worker.min.js

.PHONY: demo test lint docs bench new-pass page clean

demo: $(STAMP)
	$(BIN)/python -m benchmarks.demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist=worksteal

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/python .ci/typecheck

docs: $(STAMP)
	$(BIN)/python -m graphopt.tools.docs

new-pass: $(STAMP)
	@$(BIN)/python -m graphopt.tools.new_pass $(NAME)

# torchvision's wheel asks for no more than the torch that is pinned here.
$(STAMP): pyproject.toml | $(LAYOUT)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "setuptools>=77"
	$(BIN)/pip install --quiet --no-compile --editable ".[test]"
	$(BIN)/pip install --quiet --no-compile --no-deps torchvision==0.28.0
	touch $@

# The library that lays out the graphs of `graphopt diff --html`: fetched once, by its checksum, and never committed.
page: $(LAYOUT)

$(LAYOUT): $(PAGE)/package-lock.json
	@command -v npm >/dev/null || { echo "the page of 'graphopt diff --html' is built with npm, which is not here" >&2; exit 1; }
	npm ci --prefix $(PAGE) --ignore-scripts --no-audit --no-fund
	mkdir -p $(@D)
	cd $(PAGE)/node_modules/elkjs && cp lib/elk-api.js LICENSE.md lib/elk-worker.min.js $(abspath $(@D))
	rm -rf $(PAGE)/node_modules
	touch $@

clean:
	rm -rf $(VENV) .links .mypy_cache .ruff_cache .pytest_cache build *.egg-info $(PAGE)/vendor
