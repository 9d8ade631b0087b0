# Each target sets up what it needs on a bare Python 3.11: uv (when missing), then .venv from constraints.txt.
PYTHON ?= python3
VENV := .venv
VENV141 := .venv-flwr141
BIN := $(VENV)/bin
# An old uv lacks what is used here; ours is then made in .uv.
UV := $(shell uv venv --help 2>/dev/null | grep -q -e --clear && command -v uv || echo .uv/bin/uv)
export OMP_NUM_THREADS ?= 1
# Or each of the hundreds of processes that the tests start compiles torch and flwr anew.
unexport PYTHONDONTWRITEBYTECODE
# A test module stays in one process: its fixtures are whole runs.
PARALLEL ?= -n 2 --dist loadscope

.PHONY: help install demo test slow image compose docker arm64 check flwr141 fab bench sizes curves constraints clean

help: ## list the targets
	@grep -hE '^[a-z0-9]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

install: $(VENV)/.done ## make .venv with every pinned package

.uv/bin/uv:
	$(PYTHON) -m venv .uv
	.uv/bin/pip install -q uv

$(VENV)/.done: pyproject.toml constraints.txt | $(UV)
	$(UV) venv -q --clear --python 3.11 $(VENV)
	$(UV) pip install -q -p $(VENV) -c constraints.txt -e '.[sim,export,metrics,fast]' --group dev
	@touch $@

$(VENV141)/.done: pyproject.toml constraints-flwr141.txt | $(UV)
	$(UV) venv -q --clear --python 3.11 $(VENV141)
	$(UV) pip install -q -p $(VENV141) -c constraints-flwr141.txt -e '.[sim,export,metrics,fast]' --group dev
	@touch $@

demo: install ## ten simulated devices learn a mask of a random network on digits
	$(BIN)/fedmask run --method deltamask --data digits --clients 10 --rounds 20 --out runs/demo --overwrite

test: install ## the default tests, under ten minutes
	$(BIN)/python -m pytest $(PARALLEL)

slow: install ## the slow tests, without those on containers; many of them wait for Flower, so three at a time
	$(BIN)/python -m pytest -n 3 --dist worksteal -m "slow and not docker and not other_flower"

# The stand-in base image of the test bed, where that is; a BASE_IMAGE of one's own goes first.
TESTBED := ../shared/testbed/engine.sh
image: ## the image that the tests on containers use
	set -e; if [ -z "$${BASE_IMAGE:-}" ] && [ -f $(TESTBED) ]; then \
	  export BASE_IMAGE=ci/python-torch:3.11 PIP_EXTRA_INDEX_URL=; \
	  docker image inspect $$BASE_IMAGE >/dev/null 2>&1 || bash $(TESTBED) base; \
	fi; FEDMASK_IMAGE=$${FEDMASK_TEST_IMAGE:-fedmask-test} docker compose -f docker/compose.yaml build superlink

compose: install ## the test on containers that CI runs: the same mask as the simulation
	$(BIN)/python -m pytest -m compose_smoke --durations=10 tests/docker

docker: install ## the tests on containers; they start an engine where there is none
	$(BIN)/python -m pytest -m "docker and not arm64"

arm64: install ## an emulated arm64 against this machine: needs root and a quarter of an hour, too long for CI
	$(BIN)/python -m pytest -m arm64 -s tests/docker/test_arm64.py

check: install ## ruff, mypy --strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

flwr141: $(VENV141)/.done ## the Flower-facing tests and a real run on flwr 1.41
	$(VENV141)/bin/python -m pytest $(PARALLEL) -m "flower and not each_method and (other_flower or not slow)"

fab: install ## build the Flower App Bundle into dist/
	mkdir -p dist && cd dist && $(CURDIR)/$(BIN)/flwr build --app $(CURDIR)

bench: install ## every promised ratio: training, votes, codecs, filters, peers; BENCH=--quick is what CI runs
	$(BIN)/python benchmarks/bench.py $(BENCH)

sizes: install ## model sizes and votes of filters against the papers' figures
	$(BIN)/python benchmarks/fedmask_memory.py
	$(BIN)/python benchmarks/mpfl_bytes.py

curves: install ## longer runs of single methods; MNIST=folder of its idx files
	$(BIN)/python benchmarks/curves.py digits
	$(BIN)/python benchmarks/curves.py mnist --data-dir $(MNIST) --methods deltamask

constraints: | $(UV) ## pin every version again
	echo 'flwr==1.39.*' | $(UV) pip compile -q pyproject.toml --extra sim --extra export --extra metrics --extra fast --group dev -c - --python-version 3.11 --no-header --no-annotate --upgrade -o constraints.txt
	echo 'flwr==1.41.*' | $(UV) pip compile -q pyproject.toml --extra sim --extra export --extra metrics --extra fast --group dev -c - --python-version 3.11 --no-header --no-annotate --upgrade -o constraints-flwr141.txt

clean: ## remove what the targets made
	rm -rf $(VENV) $(VENV141) .uv dist runs/demo
