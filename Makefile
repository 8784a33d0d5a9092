# `make demo` compiles and runs the quickstart; `make test` runs everything that CI runs on each change.
# Both install into .venv first; nothing else on the machine is touched.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
WORKERS ?= 2

.PHONY: demo test zoo lint schemas locks clean

demo: $(INSTALLED)
	$(BIN)/devmap-compile profiles/quickstart.yaml
	$(BIN)/devmap run profiles/quickstart.yaml

test: $(INSTALLED) lint
	$(BIN)/devmap check -q profiles/*.yaml
	$(BIN)/pytest -n $(WORKERS) -m "not zoo" --cov -q

# Every architecture that transformers builds, against transformers' own planner: ten minutes.
zoo: $(INSTALLED)
	$(BIN)/pytest -n $(WORKERS) -m zoo -q

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# What is generated and committed.
schemas: $(INSTALLED)
	$(BIN)/devmap schema profile > schemas/profile.v1.schema.json
	$(BIN)/devmap schema lock > schemas/lock.v1.schema.json

locks: $(INSTALLED)
	for profile in profiles/*.yaml; do $(BIN)/devmap-compile -q $$profile || exit 1; done

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis .coverage
