# `make demo` and `make test` each work as the first command in a fresh clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
DEMO_DIR ?= outputs_demo

.PHONY: demo test faults lint types clean

# One environment for everything, at the exact versions of constraints.txt.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[vlmeval,lmms,show,dev]"
	@touch $@

# Tests need the tools of all commands, and compare with the original LLaVA package. It pins a 2023
# stack, but runs on this one.
$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[profile,ablate,play]"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llava-torch
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/python run_vlmeval.py --work-dir $(DEMO_DIR)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# Damaged, hostile and starved runs in full (hours); `make test` has a quick set of them.
faults: $(VENV)/.installed-test
	FAULTS=full $(BIN)/python -m pytest -s tests/faults

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

types: $(VENV)/.installed
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(DEMO_DIR) .pytest_cache .mypy_cache .ruff_cache *.egg-info
