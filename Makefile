# Everything a fresh machine with Python 3.11+, git, make and a compiler needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The one torch that the tests run on; the package itself accepts a range.
TORCH ?= torch==2.13.0

.PHONY: run test test-slow test-kvpress lint check clean

run: $(VENV)/.run
	$(BIN)/quire serve

# Two files at a time, each on one core: threads of several processes on the same cores wait for each other.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

# The long sweeps that `make test` leaves out.
test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -q -m slow --ignore=tests/pruning/test_kvpress.py

# Do our pruning policies keep what NVIDIA's kvpress keeps? It asks for an older transformers than we do: an environment
# of its own, where we are installed without what we ask for.
test-kvpress: $(VENV)-kvpress/.installed
	$(VENV)-kvpress/bin/python -m pytest -q -m slow tests/pruning/test_kvpress.py

$(VENV)-kvpress/.installed: pyproject.toml
	test -x $(VENV)-kvpress/bin/python || $(PYTHON) -m venv $(VENV)-kvpress
	$(VENV)-kvpress/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" kvpress==0.5.5 \
		msgspec pytest pytest-asyncio pytest-timeout hypothesis setuptools
	$(VENV)-kvpress/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p quire
	$(BIN)/mypy tests benchmarks

$(VENV)/.run: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.test: $(VENV)/.run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-kvpress build *.egg-info
