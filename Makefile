PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test check bench clean

$(STAMP): requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $(STAMP)

demo: $(STAMP)  ## fine-tune MiniLM on BBC News: ALS, the eager baseline and AdamW
	$(BIN)/fastals finetune --model minilm --dataset bbc-news --compare --name demo

test: $(STAMP)  ## the whole test suite
	$(BIN)/pytest

check: $(STAMP)  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/types && $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/types .
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p fastals

bench: $(STAMP)  ## the quick benchmark profile, its page in runs/bench; every case with pytest bench --full
	mkdir -p runs/bench
	$(BIN)/pytest bench --benchmark-only --benchmark-json=runs/bench/quick.json
	$(BIN)/fastals bench report runs/bench/quick.json --out runs/bench

clean:
	rm -rf $(VENV) build *.egg-info
