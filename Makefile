# Two commands: `make demo` and `make test`. Each makes what it needs and rebuilds only what changed.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
DEMO ?= demo

BIN := $(VENV)/bin
SOURCES := CMakeLists.txt pyproject.toml $(shell find csrc -type f) $(wildcard tsynd/*.py)

.PHONY: help build test demo wheel bench lint format clean
help:
	@echo "make demo    train, synthesise and report on phantom cells, into $(DEMO)/"
	@echo "make test    build and run the tests"
	@echo "make bench   measure head_uncertainty against its floor and its peers"
	@echo "make wheel   build a wheel and try it in a fresh environment"
	@echo "make lint    ruff, mypy, clang-format"

# torch by its own pin first: a range would take a build with gigabytes of CUDA beside it
$(VENV)/.torch:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q "$(TORCH)"
	$(BIN)/pip install -q numpy "scikit-build-core>=0.10" "pybind11>=2.13" ninja cmake
	touch $@

$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install -q --no-build-isolation -C cmake.define.TSYND_WERROR=ON -e ".[test]"
	touch $@

build: $(VENV)/.built

test: build
	$(BIN)/python -m pytest

demo: build
	$(BIN)/tsynd run --data phantom --train-size 200 --output $(DEMO)
	@echo "open $(DEMO)/report.html"

bench: build
	$(BIN)/python -m benchmarks head

wheel: $(VENV)/.torch $(SOURCES)
	rm -rf dist $(VENV)-wheel
	$(BIN)/pip wheel -q --no-build-isolation --no-deps -w dist .
	$(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/pip install -q "$(TORCH)" numpy
	$(VENV)-wheel/bin/pip install -q --no-deps dist/tsynd-*.whl
	cd "$$(mktemp -d)" && "$(abspath $(VENV)-wheel)/bin/python" "$(abspath tests/smoke.py)"
	rm -rf $(VENV)-wheel

lint: build
	$(BIN)/pip install -q mypy ruff "clang-format>=18"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -type f)

format: build
	$(BIN)/pip install -q ruff "clang-format>=18"
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc -type f)

clean:
	rm -rf build dist $(VENV) $(VENV)-wheel
