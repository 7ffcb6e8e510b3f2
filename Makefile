# The commands of the project. `make quickstart` and `make test` need only Python >= 3.10, make and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Nothing here phones home, and nothing looks for a model hub.
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export RAY_USAGE_STATS_ENABLED := 0
export TOKENIZERS_PARALLELISM := true

.DEFAULT_GOAL := help
.PHONY: help install quickstart ppo-demo critic-demo overoptimisation-demo test test-all peers soak audit docs docs-site lint
.PHONY: format clean

help: ## Show this list.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-21s %s\n", $$1, $$2}'

# The stamp is written only after a complete installation, so an interrupted one is simply continued.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python >= 3.10 is needed, this is " + sys.version) if sys.version_info < (3, 10) else None'
	$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --progress-bar off --quiet --editable '.[test]'
	touch $@

install: $(VENV)/.installed ## Make .venv and install the project with its tests into it.

quickstart: $(VENV)/.installed ## Human ratings -> preferences -> a trained critic -> an export that plain transformers loads.
	$(BIN)/python -m jobs.quickstart

ppo-demo: $(VENV)/.installed ## A policy learns by PPO from the quickstart's critic (made first if need be), through real scorers.
	$(BIN)/python -m jobs.demos.ppo_demo

critic-demo: $(VENV)/.installed ## PPO with a critic against RLOO, where an early word decides the reward: three seeds each.
	$(BIN)/python -m jobs.demos.critic_demo

overoptimisation-demo: $(VENV)/.installed ## Best-of-n and PPO against known gold scorers: mean, pessimistic and ensemble rewards.
	$(BIN)/python -m jobs.demos.overoptimisation_demo
	$(BIN)/python -m jobs.demos.overoptimisation_ppo

lint: $(VENV)/.installed ## ruff (lint and format check) and mypy.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Three processes share the tests; tests/README.md says which stay together.
PYTEST := $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder
DURATIONS := benchmarks/test_durations.txt

test: lint ## Lint, types, and every test that is not slow.
	$(PYTEST) -m "not slow and not cluster and not peers" $(PYTEST_OPTIONS)

test-all: $(VENV)/.installed ## `make test`, then the slow tests and those with clusters; writes the durations of all.
	rm -f $(DURATIONS)
	$(MAKE) test PYTEST_OPTIONS=--durations-file=$(DURATIONS)
	$(PYTEST) -m "slow or cluster" --durations-file=$(DURATIONS)

# Each peer is installed into an environment of its own (RLHF_CRITIC_PEERS, by default .cache/peers); what is there stays.
# One peer: python -m tests.peers.install NAME, then pytest tests/peers/test_NAME.py.
peers: $(VENV)/.installed ## Contracts with other projects' real code (docs/compatibility.md); installs gigabytes once.
	-$(BIN)/python -m tests.peers.install
	$(BIN)/python -m pytest -m peers tests/peers
	$(BIN)/python -m docs.generate

soak: $(VENV)/.installed ## Ten minutes of training, serving and publishing together, with a kill every 15 s.
	$(BIN)/python -m tests.soak

# In an environment of its own, so that what it needs is not among what it judges. Strict: a package of which the service
# knows nothing is a failure, or a mirror that has no such service would make everything look clean.
audit: $(VENV)/.installed ## Known vulnerabilities of the installed packages; asks PyPI, so needs a network that has it.
	$(PYTHON) -m venv .cache/audit
	.cache/audit/bin/python -m pip install --progress-bar off --quiet 'pip-audit>=2.9,<3'
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+.*//' > .cache/audit/requirements.txt
	.cache/audit/bin/pip-audit --strict --disable-pip --no-deps --requirement .cache/audit/requirements.txt

docs: $(VENV)/.installed ## Generate docs/options.md, docs/compatibility.md and the file list of docs/architecture.md.
	$(BIN)/python -m docs.generate

# In an environment of its own, so that the test environment stays small.
docs-site: docs ## Build the documentation as a site into site/; a dead link is a failure.
	$(PYTHON) -m venv .cache/docs-venv
	.cache/docs-venv/bin/python -m pip install --progress-bar off --quiet \
		"$$(sed -n 's/^ *"\(mkdocs-material[^"]*\)".*/\1/p' pyproject.toml)"
	NO_MKDOCS_2_WARNING=1 .cache/docs-venv/bin/mkdocs build --strict --site-dir site

format: $(VENV)/.installed ## Rewrite the code in the house format.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove the environment, the cache and the runs.
	rm -rf $(VENV) .cache runs site
