# make help lists the targets. Each does the set-up it needs, once, in .venv.

VENV    := .venv
PY      := $(VENV)/bin/python
READY   := $(VENV)/.ready
WORKERS ?= 2
TORCH   ?= auto
ARGS    ?=

# The first Python from 3.11 to 3.14. Each is run, because a name on the PATH may be a mere shim.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
    $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null \
    && echo $$p && break; done)

# Threads that spin while they wait for each other are slow beside any other busy process.
export OMP_WAIT_POLICY ?= PASSIVE

# Tests and notebooks never ask the network for anything.
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1

.DEFAULT_GOAL := help
.PHONY: help setup lab test check lint coverage mutants format doctor course finetune bench experiments gpu-report \
    claims pages notebooks clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' Makefile

$(READY): pyproject.toml constraints.txt qlora_edu/course/set_up.py
	@test -n "$(PYTHON)" || { echo "FAIL no Python 3.11, 3.12, 3.13 or 3.14 on the PATH. Install one" \
	    "(python.org, or your system's packages), or: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	@"$(PYTHON)" qlora_edu/course/set_up.py $(VENV) --torch $(TORCH)
	@touch $@

setup:  ## set up again, whatever was set up before
	@rm -f $(READY)
	@$(MAKE) --no-print-directory $(READY)

lab: $(READY)  ## open the course in JupyterLab
	$(PY) -m jupyterlab $(if $(filter 0,$(shell id -u)),--allow-root) --ServerApp.root_dir=. \
	    --LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb $(ARGS)

test: lint  ## lint, run every test, run every notebook
	$(OFFLINE) $(PY) -m pytest -n $(WORKERS) --dist loadfile $(ARGS)
	$(OFFLINE) OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist loadfile --nbval-lax \
	    --nbval-current-env --nbval-sanitize-with tests/nbval_sanitize.cfg $(ARGS) notebooks

check: lint  ## what a change needs, in about a minute: lint, types, the fast tests
	$(OFFLINE) $(PY) -m pytest -n $(WORKERS) --dist loadfile -q -m "not slow and not browser" $(ARGS)

lint: $(READY)  ## check format, style and types
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

coverage: $(READY)  ## which lines of the method no test reaches, and the floor
	$(OFFLINE) $(PY) -m coverage run -m pytest -q -m "not browser" $(ARGS)
	$(PY) -m coverage report

mutants: $(READY)  ## break the code on purpose, and see the tests notice (ARGS=NAME: some)
	$(OFFLINE) $(PY) tests/mutants.py $(ARGS)

format: $(READY)  ## put format and imports right
	$(PY) -m ruff check --fix-only --select I .
	$(PY) -m ruff format .

doctor: $(READY)  ## is this machine ready?
	$(PY) -m qlora_edu doctor

course: $(READY)  ## run all notebooks, HTML under build/course
	$(OFFLINE) $(PY) -m qlora_edu.course.run_notebooks --html build/course $(ARGS)

finetune: $(READY)  ## fine-tune the embedded model: answers before and after
	$(PY) -m qlora_edu finetune --preset embedded $(ARGS)

bench: $(VENV)/bench  ## time the quantiser and a QLoRA step beside their peers
	PYTHONPATH=$(VENV)/bench $(PY) benchmarks/bench.py $(ARGS)

# Apart from the course's own packages: transformers and PEFT load torchao wherever they find it.
$(VENV)/bench: $(READY) pyproject.toml constraints.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --upgrade --no-deps --target $@ \
	    -c constraints.txt torchao
	@touch $@

experiments: $(READY)  ## chapter 8's study: interrupt it, run it again, it goes on
	$(OFFLINE) $(PY) benchmarks/three_ways.py $(ARGS)

gpu-report: $(READY)  ## measure on this machine's GPU (ARGS=--dry-run: try it on a CPU)
	$(OFFLINE) $(PY) -m benchmarks.gpu $(ARGS)

claims: $(READY)  ## recompute the claims ledger, and the tables of README and docs
	$(OFFLINE) $(PY) -m benchmarks.claims
	$(PY) -m benchmarks.pages

pages: $(READY)  ## fill the tables of README and docs from the stored results
	$(PY) -m benchmarks.pages

notebooks: $(READY)  ## run all notebooks and keep their outputs
	$(OFFLINE) $(PY) -m qlora_edu.course.run_notebooks --in-place $(ARGS)

clean:  ## remove what was made here, the environment too
	rm -rf $(VENV) build .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage qlora_edu.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
