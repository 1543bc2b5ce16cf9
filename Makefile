# `make test` and `make demo` work in a fresh clone: they make .venv themselves. Nothing has to be activated.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
.PHONY: help setup demo test test-all multi speed tables pages docs preview docs-browser docs-check fmt lock

READY := .venv/.ready
PY := .venv/bin/python
NB ?=

# one thread a process, and no spinning: two OpenMP threads on a busy machine are far slower than one
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false
export PYTHONUNBUFFERED := 1
export PYTHONWARNINGS ?= ignore:IProgress not found
export JUPYTER_PREFER_ENV_PATH := 1
export PATH := $(CURDIR)/.venv/bin:$(PATH)
unexport MPLBACKEND IN_TEST PYTHONDONTWRITEBYTECODE

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

$(READY): .ci/requirements.lock .ci/setup pyproject.toml
	@.ci/setup

setup: $(READY) ## make .venv from the lock, if it is not there or the lock has changed
	@:

demo: $(READY) ## DP2O-SR end to end on the embedded photographs, on the CPU
	@$(PY) .ci/runs.py --out demo -p out nbs/_runs/demo train_dp2o

test: ## sync of notebooks, package and README; ruff; every notebook; pytest: minutes
	@.ci/run fast

test-all: ## make test, then the tests marked slow (real launches, papermill, whole pipelines) and repeat
	@.ci/run every

multi: $(READY) ## two processes on the CPU against one: DDP and FSDP, banks and training
	@.venv/bin/pytest -q --durations 15 tests/test_multi.py

speed: $(READY) ## run every nbs/bench_*.ipynb; fails on a missed goal
	@$(PY) .ci/runs.py 'bench_*'

tables: $(READY) ## run every nbs/table_*.ipynb over the committed records
	@$(PY) .ci/runs.py 'table_*'

pages: $(READY) ## re-execute in place the notebooks whose outputs are shown (NB="00_core index" for some)
	@$(PY) .ci/pages.py $(NB)
	@$(PY) .ci/readme.py

docs: $(READY) ## render the site into _docs with your own Quarto
	@$(PY) .ci/docs.py

preview: $(READY) ## render the site into _docs without Quarto, plain; tell dead links and faulty formulas
	@$(PY) .ci/docs.py --preview

docs-browser: preview ## sliders of the preview and a ranking page, in Chromium
	@$(PY) -m uv pip install --quiet --python $(PY) playwright==1.65.2
	@$(PY) .ci/browser.py

docs-check: $(READY) ## check the notebooks and the tree without rendering
	@$(PY) .ci/site_checks.py

fmt: $(READY) ## export the package, clean the notebooks, write README.md
	@.venv/bin/nbdev_export
	@.venv/bin/nbdev_clean
	@$(PY) .ci/readme.py

lock: $(READY) ## resolve pyproject.toml again into .ci/requirements.lock
	@$(PY) .ci/lock.py
