# Needs Python >= 3.11 with pip; with a C++ compiler the kernels are built too. Every target works on a fresh clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# PyTorch first and by its exact version: the one that figures are measured with.
TORCH := torch==2.13.0

# Another environment's packages, and this one without its kernels.
PURE := build/pure
PURE_TESTS := tests/ops tests/semantics/test_precision.py tests/semantics/test_equivalence.py tests/unit \
	tests/e2e/test_kernels.py tests/e2e/test_quantize.py tests/e2e/test_generate_api.py

.PHONY: demo test test-pure sanitize check bench docs format clean

demo: $(VENV)/.installed
	$(BIN)/quicksilver demo

test: $(VENV)/.installed
	$(BIN)/pytest

# What does not need the kernels, on an installation that has none.
test-pure: $(VENV)/.installed
	$(BIN)/python -m venv $(PURE)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$($(PURE)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/packages.pth
	QUICKSILVER_PURE_PYTHON=1 $(PURE)/bin/pip install --quiet --disable-pip-version-check --no-deps .
	! $(PURE)/bin/python -c "import quicksilver.ops._native"
	$(PURE)/bin/python -m pytest $(PURE_TESTS)

# The kernels' tests on a build with the address and undefined behaviour sanitizers; needs a C++ compiler and CMake.
sanitize: $(VENV)/.installed
	$(BIN)/python -m scripts.sanitize

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.engine

docs: $(VENV)/.installed
	$(BIN)/python -m scripts.cli_docs > docs/cli.md

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed: pyproject.toml requirements-dev.txt $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check -c requirements-dev.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
