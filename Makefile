# Everything is installed into .venv; nothing else is needed than Python 3.11+, a C compiler
# and the headers of Python. `make clean` before changing SHMRING_SANITIZE or SHMRING_COVERAGE.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTHONS ?= 3.11 3.12 3.13 3.14 3.14t 3.15 3.15t
COMPILED := $(wildcard cython/shmring/_core/*)
PYTHON_SOURCES := $(wildcard src/shmring/*.py src/shmring/*/*.py)
ASAN_READS := 2000000
TSAN_MESSAGES := 10000
STUBS = $(patsubst src/shmring/_core/%.pyi,shmring._core.%,$(wildcard src/shmring/_core/*.pyi))
ON_PATH := PATH="$(CURDIR)/$(BIN):$$PATH"
SECONDS := 600
RESULTS := benchmarks/results
PEERS = $(shell sed -nE '/^peers = \[/,/^\]/s/^ *"(.*)",$$/\1/p' pyproject.toml)
PYTEST := $(BIN)/python -m pytest -q
# Most tests wait for processes most of the time.
WORKERS := $(shell n=$$(nproc); echo $$((n < 2 ? 2 : n > 12 ? 12 : n)))
SHARED := -n $(WORKERS) --dist worksteal

export PIP_DISABLE_PIP_VERSION_CHECK := 1
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: build $(shell sed -nE 's/^([a-z0-9-]+):.*\#\# .*/\1/p' $(firstword $(MAKEFILE_LIST)))

help:  ## this list
	@sed -nE 's/^([a-z0-9-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

demo: build $(VENV)/.with-all  ## the main job on real text; DEMO_ARGS="PATH --workers 4 --kill"
	$(BIN)/shmring demo $(DEMO_ARGS)

test: build $(VENV)/.with-test  ## all tests but torture; TEST_ARGS="-k ring -x"
	$(PYTEST) $(SHARED) $(TEST_ARGS)

test-fallback: build $(VENV)/.with-test  ## the tests marked both_backends, on the fallback
	SHMRING_BACKEND=queue $(PYTEST) $(SHARED) -m "both_backends and not torture" $(TEST_ARGS)

# With a few hundred MB of packages, which `make test` does without.
test-loaders: build $(VENV)/.with-test-loaders  ## tensors, DataLoader, pandas, loguru, faster-fifo
	$(PYTEST) $(SHARED) tests/tensors tests/hooks tests/repository/test_documents.py \
	  tests/repository/test_examples.py tests/repository/test_house.py $(TEST_ARGS)

torture: build $(VENV)/.with-test  ## the long tests; SHMRING_STRIDE=10 kills at one in ten instructions
	$(PYTEST) -m torture -o faulthandler_timeout=1200 $(TEST_ARGS)

soak: build $(VENV)/.with-test  ## kill and stop at random, account for every message; SECONDS=600
	$(BIN)/python tests/soak/soak.py --seconds $(SECONDS) $(SOAK_ARGS)

matrix:  ## the suite on several interpreters, in one table; MATRIX="3.12 3.14d musl /path/to/python"
	$(PYTHON) tests/platforms/matrix.py $(MATRIX) $(MATRIX_ARGS)

qemu-aarch64: build  ## build for aarch64, and run tests there under qemu-user (Debian)
	$(BIN)/python tests/aarch64/emulated.py --install

# spin is a program of the system's, as the compiler is: where it is missing check.py says how to get it.
model:  ## search the models of the protocol with spin, and for mistakes in them; MODEL_ARGS="--only ring"
	$(PYTHON) docs/model/check.py $(MODEL_ARGS)

# Anew each time: pages that were not read again would neither be checked nor know new pages.
docs: build $(VENV)/.with-docs  ## the documentation, into build/docs/index.html
	$(BIN)/sphinx-build -q -E -W --keep-going -d build/docs-cache docs build/docs
	$(BIN)/python docs/check_links.py build/docs

faults:  ## write docs/faults.md from the marks on the tests
	$(PYTHON) tests/faults.py

BENCH := $(PYTEST) benchmarks --benchmark-only --benchmark-quiet -W default

bench: build $(VENV)/.with-bench  ## rates beside multiprocessing; BENCH_ARGS="--scale 0.1 -k dict"
	$(BENCH) $(BENCH_ARGS)

# One by one: a peer that cannot be installed is left out, and the reason shown.
bench-peers: build $(VENV)/.with-bench  ## the same, and beside the packages of the extra `peers`
	for peer in $(PEERS); do \
	  $(BIN)/pip install -q "$$peer" || echo "$$peer: not installed, left out"; \
	done
	$(BENCH) --peers --results $(RESULTS)/peers.json $(BENCH_ARGS)

report: build $(VENV)/.with-bench  ## every figure beside its target; REPORT_ARGS="--only small dicts"
	$(BIN)/python -m benchmarks.report --peers $(REPORT_ARGS)

curves: build $(VENV)/.with-bench  ## rates by size, round trips; CURVES_ARGS=--short
	$(BIN)/python -m benchmarks.curves --peers $(CURVES_ARGS)

scaling: build  ## one queue between many processes; SCALING_ARGS="--shapes 4:4 16:16"
	$(BIN)/python -m benchmarks.scaling $(SCALING_ARGS)

limits: build $(VENV)/.with-bench  ## limits of this machine, measured in C, and the share reached
	$(BIN)/python -m benchmarks.limits $(LIMITS_ARGS)

budgets: build $(VENV)/.with-test  ## instructions a call beside their budgets; BUDGETS_ARGS=--write
	$(BIN)/python -m benchmarks.instructions $(BUDGETS_ARGS)

# A build of its own in build/asan; the runtime must be the first library that is loaded, and
# Python's small objects must come from malloc, where what lies beside them is known.
asan: $(VENV)/.asan $(VENV)/.with-test  ## mutated memory under AddressSanitizer and UBSan; ASAN_READS=10000000
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so)" PYTHONMALLOC=malloc \
	  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
	  UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  PYTHONPATH=build/asan/lib:tests $(BIN)/python -m fuzz --sanitized --reads $(ASAN_READS) $(ASAN_ARGS)

tsan: $(VENV)/.tsan $(VENV)/.with-test  ## threads in one handle under ThreadSanitizer; TSAN_MESSAGES=20000
	LD_PRELOAD="$$(gcc -print-file-name=libtsan.so)" \
	  TSAN_OPTIONS=history_size=7:exitcode=66 \
	  PYTHONPATH=build/tsan/lib:tests:tests/process $(BIN)/python tests/tsan/run.py --messages $(TSAN_MESSAGES)

lint: build $(VENV)/.with-lint  ## ruff, mypy, cython-lint, stubs, workflows, what the sdist holds
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict src
	$(ON_PATH) cython-lint cython
	$(if $(STUBS),$(ON_PATH) stubtest --allowlist tests/stubtest.txt \
	  --ignore-unused-allowlist --ignore-disjoint-bases $(STUBS))
	$(BIN)/zizmor --quiet --offline .github
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	CIBW_ARCHS_LINUX="x86_64 aarch64" CIBW_ARCHS_MACOS="x86_64 arm64" CIBW_ARCHS_WINDOWS=AMD64 \
	  sh -ec 'for platform in linux macos windows; do \
	    $(BIN)/cibuildwheel --print-build-identifiers --platform $$platform .; done' \
	  | diff .github/wheels.txt -
	$(if $(wildcard .git),$(ON_PATH) check-manifest --quiet --no-build-isolation)

# For each Python that is here, and four platforms; the Python's own is tested as CI tests it.
wheels: $(VENV)/.with-wheel  ## build each wheel that can be built here, and test those that run; PYTHONS="3.12 PATH"
	$(BIN)/python tests/platforms/wheels.py $(PYTHONS) $(WHEELS_ARGS)

wheel: $(VENV)/.with-wheel  ## the wheel of one Python, with the tests of both backends
	$(BIN)/python tests/platforms/wheels.py $$(command -v $(PYTHON)) --targets own --tests "-m 'both_backends and not torture'"

# As a user without our tree would get it: alone in a folder.
sdist: $(VENV)/.with-wheel  ## make the sdist, and build and test what it holds
	rm -rf dist build/sdist && mkdir -p build/sdist
	$(BIN)/python -m build --sdist --outdir dist .
	tar -xzf dist/*.tar.gz -C build/sdist --strip-components=1
	$(MAKE) -C build/sdist test test-fallback

# Bytecode too: each process that a test or a benchmark starts would compile the modules again.
build: $(VENV)/.built
	@$(BIN)/python -m compileall -q src tests benchmarks

$(VENV)/.built: $(VENV)/.editable $(COMPILED)
	SHMRING_REQUIRE_EXTENSION=1 $(BIN)/python setup.py -q build_ext --inplace
	touch $@

# The package itself, from src. The extension is left to .built, which keeps what it compiled.
$(VENV)/.editable: setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade 'setuptools>=77' 'cython>=3.1'
	SHMRING_REQUIRE_EXTENSION= SHMRING_NO_EXTENSION=1 $(BIN)/pip install -q --no-build-isolation -e .
	touch $@

# An extra of pyproject.toml.
$(VENV)/.with-%: $(VENV)/.editable
	SHMRING_REQUIRE_EXTENSION= SHMRING_NO_EXTENSION=1 $(BIN)/pip install -q --no-build-isolation -e '.[$*]'
	touch $@

.PRECIOUS: $(VENV)/.with-%

SANITIZED := SHMRING_REQUIRE_EXTENSION=1 $(BIN)/python setup.py -q build

$(VENV)/.asan: $(VENV)/.editable $(COMPILED) $(PYTHON_SOURCES)
	SHMRING_SANITIZE=address,undefined $(SANITIZED) --build-base build/asan --build-lib build/asan/lib
	touch $@

$(VENV)/.tsan: $(VENV)/.editable $(COMPILED) $(PYTHON_SOURCES) tests/tsan/hammer.pyx
	SHMRING_SANITIZE=thread $(SANITIZED) --build-base build/tsan --build-lib build/tsan/lib
	$(BIN)/cython -3 -I cython -o build/tsan/hammer.c tests/tsan/hammer.pyx
	$${CC:-gcc} -shared -fPIC -O1 -g1 -w -fsanitize=thread -fno-omit-frame-pointer -I cython/shmring/_core \
	  -I "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))')" \
	  -o build/tsan/lib/hammer.so build/tsan/hammer.c
	touch $@

clean:  ## forget everything that was built or installed here
	rm -rf $(VENV) build dist wheelhouse src/*.egg-info src/shmring/_core/*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find src tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
