# Needs Python >= 3.11 with venv and pip; with a C++ compiler and Python's headers the kernels are built too. Every target
# works on a fresh clone, and says what is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# PyTorch first and by its exact version: the one that figures are measured with.
TORCH := torch==2.13.0
# Processes that share the tests, one thread each.
JOBS ?= 2
NEEDED := Python 3.11 or newer with venv and pip is needed; name another with make PYTHON=python3.12

# Another environment's packages, and this one without its kernels.
PURE := build/pure
PURE_TESTS := tests/ops tests/semantics/test_precision.py tests/semantics/test_equivalence.py tests/unit \
	tests/e2e/test_kernels.py tests/e2e/test_quantize.py tests/e2e/test_generate_api.py

TRANSFORMERS_TESTS := tests/e2e/test_generate_loop.py tests/e2e/test_generate_api.py tests/parity/test_families.py

.PHONY: demo test quick test-pure test-transformers sanitize check bench docs format clean

demo: $(VENV)/.installed
	$(BIN)/quicksilver demo

test: $(VENV)/.developed
	$(BIN)/pytest -n $(JOBS)

# The suite without what takes longest: whole calibrations, the README's commands, properties over all plans.
quick: $(VENV)/.developed
	$(BIN)/pytest -n $(JOBS) -m "not slow"

# What does not need the kernels, on an installation that has none.
test-pure: $(VENV)/.developed
	$(BIN)/python -m venv $(PURE)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$($(PURE)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/packages.pth
	QUICKSILVER_PURE_PYTHON=1 $(PURE)/bin/pip install --quiet --disable-pip-version-check --no-deps .
	! $(PURE)/bin/python -c "import quicksilver.ops._native"
	$(PURE)/bin/python -m pytest -n $(JOBS) $(PURE_TESTS)

# Generation and equality with transformers on the oldest and the newest release that the package allows, without kernels.
RELEASES := 5.0.0 5.24.0
test-transformers: $(VENV)/.developed
	for release in $(RELEASES); do \
		env=build/transformers-$$release && $(BIN)/python -m venv $$env && \
		purelib=$$($$env/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))") && \
		{ echo $(CURDIR)/src; $(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))"; } \
			> $$purelib/packages.pth && \
		$$env/bin/pip install --quiet --disable-pip-version-check transformers==$$release && \
		$$env/bin/python -m pytest -n $(JOBS) $(TRANSFORMERS_TESTS) || exit 1; \
	done

# The kernels' tests on a build with the address and undefined behaviour sanitizers; needs a C++ compiler and CMake.
sanitize: $(VENV)/.developed
	$(BIN)/python -m scripts.sanitize

check: $(VENV)/.developed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

bench: $(VENV)/.developed
	$(BIN)/python -m benchmarks.engine

docs: $(VENV)/.developed
	$(BIN)/python -m scripts.cli_docs > docs/cli.md

format: $(VENV)/.developed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed: pyproject.toml requirements-dev.txt $(wildcard csrc/*)
	@command -v $(PYTHON) > /dev/null || { echo "There is no $(PYTHON): $(NEEDED)." >&2; exit 1; }
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" \
		|| { echo "$(PYTHON) is $$($(PYTHON) --version 2>&1): $(NEEDED)." >&2; exit 1; }
	@$(PYTHON) -c "import ensurepip, venv" 2> /dev/null \
		|| { echo "$(PYTHON) lacks venv or ensurepip (Debian, Ubuntu: apt install python3-venv): $(NEEDED)." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check -c requirements-dev.txt -e .
	@$(BIN)/python -c "import quicksilver.ops._native" 2> /dev/null || echo "Note: there are no compiled kernels: no C++17" \
		"compiler or no Python headers (Debian, Ubuntu: apt install g++ python3-dev), or the build failed" \
		"(\`$(BIN)/pip install -v .\` shows how). All works without them, more slowly; tests of them are skipped." >&2
	touch $@

# What tests and checks need besides, named without the package, which need not be built again.
$(VENV)/.developed: $(VENV)/.installed
	$(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['dev'], sep='\n')" \
		> $(VENV)/dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c requirements-dev.txt -r $(VENV)/dev.txt
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
