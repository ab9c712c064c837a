# Every target sets up what it needs: .venv with pinned packages, the compiled kernels, the library.
PYTHON ?= python3
# full, core, or tuning for tuning/tiles.py. The wheel and the GPU tests take full, the rest core.
KERNELS ?=
WHEEL_DIR ?= dist
# Dates the files in the wheel, so that a commit makes the same wheel every time.
export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || date +%s)
PYTEST ?=# of an environment with an installed wheel, for the GPU tests

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --no-deps --require-hashes
LOCK := uv pip compile --quiet --no-deps --no-strip-extras --no-annotate --generate-hashes --only-binary :all: \
	--emit-build-options --python-version 3.11 --custom-compile-command "make lock"
# A worker a core, which takes tests from the slower ones when it has none left.
TEST := $(BIN)/python -m pytest -n auto --dist worksteal
SOURCES := kernels fa4_ext fa4_ext_autoload.py tests benchmarks tuning scripts examples setup.py
CXX_SOURCES := $(wildcard csrc/*.cpp $(foreach folder,csrc/* csrc/*/* examples/cpp tests/*,\
	$(folder)/*.cpp $(folder)/*.h $(folder)/*.c))

.DEFAULT_GOAL := help
.PHONY: help lock demo build docs test test-all interpret sanitize lint format wheel hub compat gpu-test bench clean distclean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 18

# A virtual environment for each list of packages would hold torch twice, so the lists stack in one.
$(VENV)/bin/python:
	scripts/tools/bootstrap.sh $(PYTHON)
	$(PYTHON) -m venv $(VENV)

# The lists are complete, so that pip need not look for what their packages need, and `pip check`
# finds what they lack.
$(VENV)/build.stamp: requirements/torch.txt requirements/build.txt requirements/torch_cuda.txt | $(VENV)/bin/python
	scripts/tools/bootstrap.sh $(PYTHON)
	$(PIP) download --no-deps --only-binary :all: --dest $(VENV)/torch -r requirements/torch.in
	$(INSTALL) --no-index --find-links $(VENV)/torch -r requirements/torch.txt
	rm -r $(VENV)/torch
	$(INSTALL) -r requirements/build.txt
	$(PIP) check > /dev/null || $(INSTALL) -r requirements/torch_cuda.txt
	$(PIP) check
	touch $@

$(VENV)/test.stamp: requirements/test.txt requirements/hub.txt $(VENV)/build.stamp
	scripts/tools/bootstrap.sh $(PYTHON) tests
	$(INSTALL) -r $<
	$(PIP) check
	rm -rf $(VENV)/hub
	$(INSTALL) --target $(VENV)/hub -r requirements/hub.txt
	touch $@

lock: ## renew the hashes of requirements/*.in, with uv; torch.txt says how it is renewed
	$(foreach list,build test hub bench torch_cuda,\
		$(LOCK) requirements/$(list).in -o requirements/$(list).txt &&) true

demo: $(VENV)/build.stamp ## set up, run attention beside PyTorch's; without a GPU show the plans
	FA4_EXT_KERNELS=$(or $(KERNELS),core) $(BIN)/python setup.py --quiet build_ext --inplace
	$(BIN)/python -m fa4_ext demo

build: $(VENV)/test.stamp ## compile the core kernels and link the library into fa4_ext/, for development
	FA4_EXT_KERNELS=$(or $(KERNELS),core) FA4_EXT_TESTS=1 \
		$(BIN)/python setup.py --quiet build_ext --inplace

docs: build ## renew docs/support.md and the tables of results; print which calls fall back
	$(BIN)/python -m scripts.documents.performance
	PYTHONPATH=build/tests $(BIN)/python -m scripts.documents.support

test: build ## run the tests that need no GPU and no patience
	$(TEST) -m "not gpu and not long" $(ARGS)

test-all: build ## run all tests that need no GPU: every core kernel in the interpreter, too
	$(TEST) -m "not gpu" $(ARGS)

interpret: ## run every kernel of the full matrix in the interpreter, for hours; ARGS="-k sm100" a part
	$(MAKE) build KERNELS=full
	FA4_EXT_INTERPRETED_DTYPES=bf16,fp16 FA4_EXT_INTERPRETED_CALLS=2 \
		$(TEST) tests/test_interpreter.py $(ARGS)

sanitize: build ## plan random and extreme problems under sanitizers
	$(BIN)/cmake --build build/$(or $(KERNELS),core)/cmake --target plan_problems
	build/$(or $(KERNELS),core)/cmake/plan_problems

lint: $(VENV)/test.stamp ## check style, types and the direction of the layers
	$(BIN)/ruff check $(wildcard $(SOURCES))
	$(BIN)/ruff format --check $(wildcard $(SOURCES))
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)
	$(BIN)/mypy
	$(BIN)/python scripts/tools/check_layers.py

format: $(VENV)/test.stamp ## rewrite Python and C++ in that style
	$(BIN)/ruff check --fix $(wildcard $(SOURCES))
	$(BIN)/ruff format $(wildcard $(SOURCES))
	$(BIN)/clang-format -i $(CXX_SOURCES)

wheel: $(VENV)/build.stamp ## compile the full matrix into dist/*.whl
	rm -rf build/lib build/bdist.* $(WHEEL_DIR)/*.whl
	FA4_EXT_KERNELS=$(or $(KERNELS),full) $(BIN)/python -m pip wheel --verbose --no-build-isolation --no-deps \
		--disable-pip-version-check --wheel-dir $(WHEEL_DIR) .
	$(BIN)/python scripts/tools/check_wheel.py $(WHEEL_DIR)/*.whl

hub: $(VENV)/build.stamp ## write dist/hub, the functions of flash-attn for Hugging Face's `kernels`
	FA4_EXT_KERNELS=$(or $(KERNELS),full) $(BIN)/python setup.py --quiet build_ext --build-lib build/hub
	$(BIN)/python -m scripts.hub.build --kernels $(or $(KERNELS),full) --out $(WHEEL_DIR)/hub
	$(BIN)/python -m scripts.hub.check $(WHEEL_DIR)/hub

compat: $(VENV)/bin/python ## test the wheel beside every torch in requirements/compat.in
	$(BIN)/python -m scripts.tools.compat --wheel $(WHEEL_DIR)/*.whl --table docs/compatibility.md $(ARGS)

gpu-test: ## run the GPU tests; on an installed wheel with PYTEST=/its/bin/pytest
	$(if $(PYTEST),,$(MAKE) build KERNELS=$(or $(KERNELS),full))
	$(or $(PYTEST),$(BIN)/python -m pytest) -m gpu tests/gpu $(ARGS)

bench: ## run the benchmark; ARGS="--json out.json --figure out.png" keep the result
	$(MAKE) build KERNELS=$(or $(KERNELS),full)
	$(BIN)/python -c 'import matplotlib' 2>/dev/null || $(INSTALL) -r requirements/bench.txt
	$(BIN)/python -m fa4_ext bench $(ARGS)

clean: ## remove what was built; compiled kernels stay in their cache
	rm -rf build dist fa4_ext/*.so fa4_ext/include fa4_ext/cmake *.egg-info
	rm -rf .pytest_cache .hypothesis .mypy_cache .ruff_cache

distclean: clean ## remove the virtual environment too
	rm -rf $(VENV)
