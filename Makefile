# Tercet. `make run` and `make test` are all a newcomer needs; `make help` lists the rest.

PYTHON ?= python3.11
VENV ?= .venv
CLIENTS_VENV ?= .venv-clients
# The linters of images and compose files, which are large binaries.
IMAGE_VENV ?= .venv-images
# Where torch comes from. Linux's default wheel of torch brings CUDA (gigabytes); for the CPU-only one:
#   make run TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
TORCH_INDEX_URL ?=

BIN := $(VENV)/bin
TORCH := $(shell grep '^torch==' constraints.txt)
TORCH_FROM := $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL),)
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help run test test-clients check unit k8s-check k8s-render cluster-sim rules-test dashboards dashboards-check demo-eval docs chaos chaos-index bench-embedding bench-search bench-pipeline bench-rerank eval-rerank bench-peers train-reranker install images image-check clean

help: ## List the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

run: $(VENV)/.installed ## Start the three services, index the demo corpus, print an answered question
	@exec $(BIN)/tercet up --demo

test: check $(CLIENTS_VENV)/.installed ## The whole check: lint, types, import rules, tests (those that measure time have the machine to themselves)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not alone'
	$(BIN)/python -m pytest -m alone $$(grep -rl --include='test_*.py' pytest.mark.alone tests)

test-clients: $(VENV)/.installed-test $(CLIENTS_VENV)/.installed ## Other people's clients against running services
	$(BIN)/python -m pytest tests/contract/test_openai_client.py tests/contract/test_tei_clients.py tests/contract/test_plain_dialects.py tests/contract/test_rerank_clients.py

check: $(VENV)/.installed-test ## Lint, types and import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: $(VENV)/.installed-test ## The tests that need no process of their own
	$(BIN)/python -m pytest tests/unit tests/contract tests/conventions

k8s-check: $(VENV)/.installed-test ## Render deploy/k8s, compare it with what is committed, and check it against the services
	$(BIN)/python -m pytest tests/deploy/test_k8s_*.py

k8s-render: $(VENV)/.installed-test ## Write deploy/k8s/rendered and the PrometheusRules from their sources
	$(BIN)/python -m tests.deploy.render

cluster-sim: $(VENV)/.installed-test ## Every pod of the rendered cpu overlay as processes here, under load: rolled, killed, drained (SIM=--prometheus: and its alerts)
	@exec $(BIN)/python -m tests.cluster $(SIM)

demo-eval: $(VENV)/.installed ## MRR@10 of the twenty demo questions, by mode
	@exec $(BIN)/tercet demo-eval

train-reranker: $(VENV)/.installed ## Make the cross-encoder that ships, in build/reranker (DATA= TRAIN='--minutes 60 --install')
	@exec $(BIN)/python -m training --data $(or $(DATA),../shared/data) --out build/reranker $(or $(TRAIN),--steps 2900)

docs: $(VENV)/.installed ## Write docs/settings.md and the ladder in docs/resilience.md from the code
	$(BIN)/python -m tests.conventions.settings_doc
	$(BIN)/python -m tests.conventions.ladder_doc

INFINITY := benchmarks/peers/infinity
VECTORS := benchmarks/peers/vectors

bench-embedding: $(VENV)/.installed-bench $(INFINITY)/.venv/.installed ## Measure the embedding service beside its peers (NOTE='what changed' BENCH=--quick)
	@exec $(BIN)/python -m benchmarks.embedding --note '$(NOTE)' $(BENCH)

$(VENV)/.installed-bench: $(VENV)/.installed-test
	@$(PIP) install -q -e '.[bench]' -c constraints.txt
	@touch $@

chaos-index: $(VENV)/.installed-test ## 200 kills of a writing search service and 200 power cuts of its ledger (RUNS= SEED=)
	TERCET_CHAOS_RUNS=$(or $(RUNS),200) TERCET_CHAOS_SEED=$(or $(SEED),1) $(BIN)/python -m pytest tests/chaos/test_index_kills.py tests/chaos/test_power_cuts.py

chaos: $(VENV)/.installed-test ## Every part of a deployment killed, frozen, slowed, garbled, cut off; writes the table in docs/resilience.md (CHAOS="-k 'redis and killed'": those rows of it)
	TERCET_CHAOS=whole $(BIN)/python -m pytest tests/chaos/test_matrix.py tests/chaos/test_troubles.py tests/chaos/test_drain.py $(CHAOS)

bench-search: $(VENV)/.installed-bench $(VECTORS)/.venv/.installed ## Measure search beside vector databases (NOTE='what changed' BENCH=--quick)
	@exec $(BIN)/python -m benchmarks.search --note '$(NOTE)' $(BENCH)

bench-pipeline: $(VENV)/.installed-bench ## Measure whole searches beside a naive orchestration (NOTE='what changed' BENCH=--quick)
	@exec $(BIN)/python -m benchmarks.pipeline --note '$(NOTE)' $(BENCH)

bench-rerank: $(VENV)/.installed-bench $(INFINITY)/.venv/.installed ## Measure the rerank service beside its peers (NOTE='what changed' BENCH=--quick)
	@exec $(BIN)/python -m benchmarks.rerank --note '$(NOTE)' $(BENCH)

eval-rerank: $(VENV)/.installed-bench ## nDCG@10 of searches with and without rerank, written to benchmarks/RERANK_QUALITY.md (DATA=../shared/data BENCH=--quick)
	@exec $(BIN)/python -m benchmarks.rerank_quality $(or $(DATA),../shared/data) --note '$(NOTE)' $(BENCH)

bench-peers: $(INFINITY)/.venv/.installed $(VECTORS)/.venv/.installed ## Install the peers that we measure beside, in environments of their own

$(INFINITY)/.venv/.installed: $(INFINITY)/requirements.txt
	@echo "Installing Infinity into $(@D); this takes a few minutes"
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip --disable-pip-version-check install -q $(TORCH) $(TORCH_FROM)
	@$(@D)/bin/python -m pip --disable-pip-version-check install -q $(TORCH) -r $<
	@touch $@

$(VECTORS)/.venv/.installed: $(VECTORS)/requirements.txt
	@echo "Installing the vector databases into $(@D); this takes a minute"
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip --disable-pip-version-check install -q -r $<
	@touch $@

install: $(VENV)/.installed ## Create .venv and install Tercet with pinned dependencies

$(VENV)/bin/python:
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing Tercet's pinned dependencies into $(VENV); the first time this takes a minute or two"
	@$(PIP) install --progress-bar on -q $(TORCH) $(TORCH_FROM) -c constraints.txt
	@$(PIP) install --progress-bar on -q -e . -c constraints.txt
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "Installing what the tests need"
	@$(PIP) install -q -e '.[test]' -c constraints.txt
	@touch $@

$(CLIENTS_VENV)/.installed: tests/contract/clients/requirements.txt
	@echo "Installing the clients that cannot live beside the product into $(CLIENTS_VENV)"
	@$(PYTHON) -m venv $(CLIENTS_VENV)
	@$(CLIENTS_VENV)/bin/python -m pip --disable-pip-version-check install -q -r $<
	@touch $@

rules-test: $(VENV)/.installed-test ## Test alerts, recording rules and dashboards (needs promtool: apt-get install prometheus)
	$(BIN)/python -m pytest -rs tests/deploy/test_rules.py tests/deploy/test_dashboards.py

dashboards: $(VENV)/.installed ## Write Grafana's dashboards from deploy/observability/grafana
	$(BIN)/python -m deploy.observability.grafana.dashboards

dashboards-check: $(VENV)/.installed-test ## Ask every panel's query of a real Prometheus over real services, and kill one of them (RECORD=1: keep the scrapes)
	$(BIN)/python -m tests.deploy.dashboards_check $(if $(RECORD),--record)

# DOCKER may be podman; the images take the version of the package.
DOCKER ?= docker
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
LABELS := --build-arg VERSION=$(VERSION) --build-arg REVISION=$$(git rev-parse HEAD) --build-arg CREATED=$$(date -u +%Y-%m-%dT%H:%M:%SZ)

images: ## Build the images for CPUs (DOCKER=podman); VARIANT=gpu: embedding and rerank for GPUs
	for target in $(if $(filter gpu,$(VARIANT)),embedding rerank,embedding rerank search tools); do \
	  $(DOCKER) build --target $$target --build-arg VARIANT=$(or $(VARIANT),cpu) $(LABELS) \
	    $(if $(TORCH_INDEX_URL),--build-arg TORCH_INDEX_URL=$(TORCH_INDEX_URL)) -t tercet-$$target:$(VERSION)$(if $(filter gpu,$(VARIANT)),-gpu) . || exit 1; \
	done

image-check: $(IMAGE_VENV)/.installed ## Lint, build and run the images, and search (root, podman; IMAGE='--base debian --torch-index-url=' without a registry)
	$(IMAGE_VENV)/bin/hadolint Dockerfile
	sh deploy/compose/check.sh $(IMAGE_VENV)/bin/python
	$(PYTHON) deploy/images/check.py $(IMAGE)

$(IMAGE_VENV)/.installed: deploy/images/requirements.txt
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip --disable-pip-version-check install -q -r $<
	@touch $@

clean: ## Remove the environment, caches and local data
	rm -rf $(VENV) $(CLIENTS_VENV) $(IMAGE_VENV) .tercet .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
