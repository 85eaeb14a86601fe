# `make demo` and `make test` need Python 3.11+, make and the package registries: each sets up what it uses
# in $(VENV), and a set-up that was interrupted is begun anew by the next call.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV ?= .venv
PYTHON ?=
DEMO_ARGS ?= --out demo_output
PYTEST_ARGS ?=

READY := $(VENV)/.ready
RUN := "$(VENV)/bin/python"
# scripts in an environment hold its absolute path: one that was moved or copied is made again
MOVED := $(shell if [ -e "$(READY)" ] && [ "$$(cat "$(READY)")" != "$$PWD" ]; then echo FORCE; fi)

.PHONY: help setup demo test lint clean clean-venv FORCE

help:
	@echo "make demo        attack a classifier, purify, print the table and save the pictures in demo_output/"
	@echo "make test        run every test"
	@echo "make lint        check style with ruff"
	@echo "make setup       only make the environment in $(VENV) (PYTHON=python3.12 picks the interpreter)"
	@echo "make clean       remove caches and outputs;  make clean-venv  remove the environment"

setup: $(READY)

demo: $(READY)
	"$(VENV)/bin/maep" demo $(DEMO_ARGS)

test: $(READY)
	$(RUN) -m pytest -n auto --maxprocesses 4 --dist loadfile $(PYTEST_ARGS)

lint: $(READY)
	$(RUN) -m ruff check .

# The marker lies outside the environment and goes last, so whatever an interruption leaves behind is not trusted.
# torch is installed by itself first: the machine's own build (CPU or CUDA) is then kept by all that follows.
$(READY): pyproject.toml constraints.txt $(MOVED)
	@if [ -e "$(VENV).incomplete" ] || [ -n "$(MOVED)" ] || ! $(RUN) -m pip --version >/dev/null 2>&1; then \
		touch "$(VENV).incomplete"; \
		rm -rf "$(VENV)"; \
		found=""; \
		for candidate in $(or $(PYTHON),python3.11 python3.12 python3.13 python3 python); do \
			if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then found="$$candidate"; break; fi; \
		done; \
		if [ -z "$$found" ]; then \
			echo "error: no Python 3.11 or newer found$(if $(PYTHON), under the name '$(PYTHON)'); name one with: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; \
		fi; \
		echo "setting up $(VENV) with $$("$$found" --version)"; \
		"$$found" -m venv "$(VENV)" || { \
			echo "error: '$$found -m venv' failed; on Debian and Ubuntu install its venv package (apt install python3-venv)" >&2; exit 1; }; \
	fi
	@touch "$(VENV).incomplete"
	$(RUN) -m pip install --quiet --disable-pip-version-check torch -c constraints.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check -e ".[dev]" -c constraints.txt
	@$(RUN) -c "import maep_hf"
	@printf '%s' "$$PWD" > "$(READY)"
	@rm -f "$(VENV).incomplete"

clean:
	rm -rf demo_output build dist .pytest_cache .ruff_cache .hypothesis ./*.egg-info
	find . -path "./$(VENV)" -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

clean-venv:
	rm -rf "$(VENV)" "$(VENV).incomplete"
