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

bench: $(STAMP)  ## the quick benchmark profile and its page in bench/results/<device>; FULL=--full for every case
	out=bench/results/$$($(BIN)/python -P -m fastals.stamp); folder=$$(dirname "$$out"); mkdir -p "$$folder"; \
	$(BIN)/pytest bench $(FULL) --benchmark-only --benchmark-json="$$out.json"; status=$$?; \
	$(BIN)/fastals bench report "$$out.json" $$(ls "$$folder"/convergence.jsonl 2> /dev/null) --out "$$folder" && \
	exit $$status

clean:
	rm -rf $(VENV) build *.egg-info
