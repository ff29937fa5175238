# Each command sets up what it needs in .venv, and is quick when it is there.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-fast coverage check oldest bench clean
.DEFAULT_GOAL := demo

$(READY): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "setting up .venv (a minute or two, once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY) ## images from a reference image
	@$(BIN)/imprompt generate --image examples/cat.png --num-images 4 --output-dir imprompt-out

test: $(READY) ## all tests
	@$(BIN)/python -m pytest -n 2 --durations=10

test-fast: $(READY) ## the tests that are not marked slow: less than a minute
	@$(BIN)/python -m pytest -n 2 -m "not slow"

coverage: $(READY) ## all tests, and the lines of the package that they do not run
	@$(BIN)/python -m pytest -n 2 --cov=imprompt --cov-report=term:skip-covered

check: $(READY) ## lint, types, layering
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q tests/test_layering.py

OLDEST := .venv-oldest
$(OLDEST)/.ready: pyproject.toml constraints-oldest.txt
	@test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	@$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e '.[lora]' pytest pytest-xdist hypothesis
	@touch $@

oldest: $(OLDEST)/.ready ## the tests around pipelines, with the oldest diffusers that is supported
	@$(OLDEST)/bin/python -m pytest -q -n 2 -o filterwarnings=default tests/unet tests/parity tests/pipelines

bench: $(READY) ## ratios to plain diffusers
	@$(BIN)/python -m benchmarks

clean: ## deletes everything that was made here, except runs/
	rm -rf .venv .venv-oldest imprompt-out .pytest_cache .mypy_cache .ruff_cache
