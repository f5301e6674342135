# `make` alone lists the targets. All of them set up what they need first: .venv is made from
# requirements/dev.lock, and made anew when that changes.
.DEFAULT_GOAL := help
.PHONY: help setup run test quick lab export format notebooks readme docs bench lock clean chromium
SHELL := /bin/sh
BIN := .venv/bin
READY := .venv/.ready
ARGS ?=

help: ## list these targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1|\2/p' Makefile | while IFS='|' read -r name text; do printf '  make %-10s %s\n' "$$name" "$$text"; done

# The stamp holds the folder that .venv was made for: a checkout that was moved is set up again.
ifneq ($(shell cat $(READY) 2>/dev/null),$(CURDIR))
.PHONY: $(READY)
endif
$(READY): requirements/dev.lock pyproject.toml scripts/setup.sh
	@scripts/setup.sh

setup: $(READY) ## make .venv, git hooks and the notebook kernel
	@echo "ready: make run, make test, make lab, or .venv/bin/titanic --help"

run: $(READY) ## run the pipeline; overrides in ARGS: make run ARGS="model=logistic seed=7"
	@$(BIN)/titanic run $(ARGS)

test: $(READY) chromium ## run all tests, as CI does; ARGS go to pytest
	@$(BIN)/python -m pytest $(ARGS)

quick: $(READY) ## run the tests without the long ones
	@$(BIN)/python -m pytest -m "not long" $(ARGS)

lab: $(READY) ## open the notebooks in JupyterLab
	@$(BIN)/jupyter lab --ServerApp.root_dir=nbs $(ARGS)

export: $(READY) ## notebooks -> package and README; formats and cleans the notebooks
	@$(BIN)/ruff format -q nbs && $(BIN)/nbdev-clean && $(BIN)/nbdev-export && $(BIN)/python scripts/readme.py
	@[ -z "$$PYTHONDONTWRITEBYTECODE" ] || $(BIN)/python -m compileall -q titanic_mlops

readme: $(READY) ## render README.md from nbs/index.ipynb
	@$(BIN)/python scripts/readme.py $(ARGS)

format: $(READY) ## format and lint notebooks and code, mending what can be mended
	@$(BIN)/ruff format -q nbs tests bench scripts && $(BIN)/ruff check --fix nbs tests bench scripts

notebooks: $(READY) ## run the notebooks again in place, so that stored outputs are fresh; some: ARGS=nbs/pipeline
	@$(BIN)/python scripts/notebooks.py $(ARGS)

docs: $(READY) ## render the site into _docs (needs Quarto)
	@$(BIN)/python scripts/docs.py

bench: $(READY) ## print the benchmarks beside their baselines
	@for file in bench/*.py; do $(BIN)/python "$$file" $(ARGS) || exit; done

LOCK = $(BIN)/uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes --no-header --annotation-style line --quiet $(ARGS)
lock: $(READY) ## renew requirements/*.lock from pyproject.toml; newest versions: ARGS=--upgrade
	@$(LOCK) --extra dev -o requirements/dev.lock >/dev/null
	@$(LOCK) --extra serve --extra tracing --extra gcp -c requirements/dev.lock -o requirements/serve.lock >/dev/null
	@$(LOCK) --extra ray --extra gcp -c requirements/dev.lock -o requirements/ray.lock >/dev/null
	@$(LOCK) --extra pipeline -c requirements/dev.lock -o requirements/pipeline.lock >/dev/null

clean: ## remove what can be made again (not .venv, not the store)
	@rm -rf _docs _proc dist build outputs multirun .pytest_cache .ruff_cache .mypy_cache .hypothesis nbs/nbdev.yml nbs/sidebar.yml
	@find . -path ./.venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

chromium:
	@command -v chromium >/dev/null || scripts/system.sh chromium "the browser tests need Chromium" || [ "$(CI)" != true ]
