# Two commands: `make demo` and `make test`. Each makes what it needs and rebuilds only what changed.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
DEMO ?= demo

BIN := $(VENV)/bin
SOURCES := CMakeLists.txt pyproject.toml $(shell find csrc -type f) $(shell find tsynd -name '*.py')

.PHONY: help build test test-fast test-slow test-kernels test-python fuzz sanitize gpu-check registers mutants demo docs \
  wheel lowest bench lint format clean
help:
	@echo "make demo    train, synthesise and report on phantom cells, into $(DEMO)/"
	@echo "make test    build and run the tests; make test-fast without the slow ones"
	@echo "make fuzz    read damaged files for some minutes: nothing but clear errors may come of it"
	@echo "make bench   measure everything against its floor and its peers, into docs/benchmarks.md"
	@echo "make sanitize  the operators' tests under the address and undefined-behaviour sanitizers, 1, 2 and 7 threads"
	@echo "make gpu-check OUT=DIR  on a machine with a GPU: build, test, sanitize, measure"
	@echo "make mutants  seeded faults in the CUDA sources, found by their tests on the host"
	@echo "make registers  what ptxas says of every CUDA kernel"
	@echo "make docs    the documentation as a site, into build/site"
	@echo "make wheel   build a wheel and try it in a fresh environment"
	@echo "make lowest  the lowest declared versions of everything, in a fresh environment"
	@echo "make lint    ruff, mypy, clang-format"

# torch by its own pin first: a range would take a build with gigabytes of CUDA beside it
$(VENV)/.torch:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q "$(TORCH)"
	$(BIN)/pip install -q numpy "scikit-build-core>=0.11" "pybind11>=2.13" ninja cmake
	touch $@

# what `tsynd run` and most commands need; no more, so that the demo is there soon
$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install -q --no-build-isolation -C cmake.define.TSYND_WERROR=ON -e ".[cli]"
	touch $@

# laplace-torch and its backends apart from the extras: they ask for torchvision, which they do not use here and which
# exists for one torch alone
LAPLACE := "laplace-torch>=0.2.3" curvlinops-for-pytorch backpack-for-pytorch asdfghjkl==0.1a4 opt-einsum einconv \
  linear-operator unfoldNd jaxtyping wadler-lindig mpmath
# tsynd itself is there by now: this adds what its extras ask for
$(VENV)/.tested: $(VENV)/.built pyproject.toml
	$(BIN)/pip install -q "tsynd[test]"
	$(BIN)/pip install -q --no-deps $(LAPLACE)
	touch $@

build: $(VENV)/.built

fuzz: $(VENV)/.tested
	$(BIN)/python tests/fuzz.py

# two processes of one thread each; a file's tests stay in one process
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
test-fast: $(VENV)/.tested $(VENV)/.torch
	$(MAKE) --no-print-directory -j 2 test-kernels test-python

test: test-fast
	$(MAKE) --no-print-directory -j 2 test-kernels test-slow ORDERS=others

# the slow ones share nothing within a file
test-slow: $(VENV)/.tested
	$(PYTEST) --dist worksteal -m "slow and not study"

test-python: $(VENV)/.tested
	$(PYTEST) -m "not slow and not study"

# ninja takes the descriptors that make -j names but does not hand on for an error: MAKEFLAGS=
# the CUDA kernels' own code on the host, by one order of the threads; ORDERS=others, ORDERS=all: by the rest, by all
ORDERS ?= one
ORDERS_one := -LE orders
ORDERS_others := -L orders
test-kernels: $(VENV)/.torch
	$(BIN)/cmake -S tests/cpp -B build/kernel-tests -G Ninja -DCMAKE_MAKE_PROGRAM="$(abspath $(BIN)/ninja)" > /dev/null
	MAKEFLAGS= $(BIN)/cmake --build build/kernel-tests
	$(BIN)/ctest --test-dir build/kernel-tests -j 2 --output-on-failure $(ORDERS_$(ORDERS))

# with the torch, cmake and ninja that $(PYTHON) has: no network, nothing installed but tsynd itself
gpu-check:
	@test -n "$(OUT)" || { echo "gpu-check: say where to: make gpu-check OUT=DIR" >&2; exit 2; }
	$(PYTHON) -m pip install -q --no-index --no-deps --no-build-isolation -C cmake.define.TSYND_CUDA=ON -e .
	$(PYTHON) -m benchmarks.gpu_check "$(OUT)"

# seeded faults in the CUDA sources, each of which the host's kernel tests must find; some ten minutes
mutants: $(VENV)/.torch
	$(BIN)/python tests/cpp/mutants.py

registers: $(VENV)/.torch
	$(BIN)/python -m benchmarks.registers

demo: build
	$(BIN)/tsynd run --data phantom --train-size 200 --output $(DEMO)
	@echo "open $(DEMO)/report.html"

bench: $(VENV)/.tested
	$(BIN)/python -m benchmarks all --json benchmarks/results/cpu.json --docs docs/benchmarks.md

# the vector kernels of every instruction set, and the same tests with more threads than there are cores
SANITIZED := build/sanitize
sanitize: $(VENV)/.tested
	$(BIN)/cmake -S . -B $(SANITIZED) -G Ninja -DCMAKE_MAKE_PROGRAM="$(abspath $(BIN)/ninja)" -DTSYND_SANITIZE=ON \
	  -DTSYND_CUDA=OFF -DPython_EXECUTABLE="$(abspath $(BIN)/python)" \
	  -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)" > /dev/null
	MAKEFLAGS= $(BIN)/cmake --build $(SANITIZED)
	for run in "1 avx512" "2 avx512" "7 avx512" "2 avx2" "2 generic"; do \
	  set -- $$run; echo "threads $$1, TSYND_ISA=$$2"; \
	  LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 TSYND_TEST_THREADS=$$1 TSYND_ISA=$$2 \
	  $(BIN)/python tests/sanitize.py $(SANITIZED) tests/ops/test_operators.py || exit 1; \
	done

docs: build
	$(BIN)/pip install -q "mkdocs-material>=9.5" "mkdocstrings[python]>=0.26"
	$(BIN)/python -m benchmarks.pages
	$(BIN)/python -m mkdocs build --strict -q
	@echo "open build/site/index.html"

# built once, tried with each torch of WHEEL_TORCH in an empty environment; then every extra must resolve
WHEEL_TORCH ?= $(TORCH)
wheel: $(VENV)/.torch $(SOURCES)
	rm -rf dist $(VENV)-wheel
	$(BIN)/pip wheel -q --no-build-isolation --no-deps -w dist .
	for torch in $(WHEEL_TORCH); do \
	  $(PYTHON) -m venv --clear $(VENV)-wheel && $(VENV)-wheel/bin/pip install -q "$$torch" numpy && \
	  $(VENV)-wheel/bin/pip install -q --no-deps dist/tsynd-*.whl && $(VENV)-wheel/bin/pip check && \
	  (cd "$$(mktemp -d)" && "$(abspath $(VENV)-wheel)/bin/python" "$(abspath tests/smoke.py)") || exit 1; \
	done
	for extra in all onnx-gpu dicom-codecs docs; do \
	  $(VENV)-wheel/bin/pip install -q --dry-run "$$(ls dist/tsynd-*.whl)[$$extra]" || exit 1; \
	done
	rm -rf $(VENV)-wheel

# every package at its lowest declared version (torch at its pin): something of every extra must run
lowest: $(VENV)/.torch $(SOURCES)
	rm -rf dist $(VENV)-lowest
	$(BIN)/pip wheel -q --no-build-isolation --no-deps -C cmake.define.TSYND_CUDA=OFF -w dist .
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/pip install -q "$(TORCH)" $$($(PYTHON) packaging/lowest.py test dicom-codecs | grep -v "^torch==")
	$(VENV)-lowest/bin/pip install -q --no-deps $(subst >=,==,$(LAPLACE)) dist/tsynd-*.whl
	cd "$$(mktemp -d)" && OMP_NUM_THREADS=1 "$(abspath $(VENV)-lowest)/bin/python" "$(abspath tests/extras.py)"
	rm -rf $(VENV)-lowest

lint: build
	$(BIN)/pip install -q mypy ruff "clang-format>=18"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc tests/cpp tests/gpu examples -name "*.[ch]*")

format: build
	$(BIN)/pip install -q ruff "clang-format>=18"
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc tests/cpp tests/gpu examples -name "*.[ch]*")

clean:
	rm -rf build dist $(VENV) $(VENV)-wheel $(VENV)-lowest
