# make demo          FFNet-1 on photographs: plain PyTorch against the kernels
# make test          all tests, lint and types among them
# make lint          lint and types only
# make bench         the quick benchmark suite, minutes: tables, report and charts in build/bench
# make gpu           on a GPU: checks and benchmarks of the CUDA and Triton kernels, Triton's tiles measured
# make wheel         dist/*.whl, for any Python and any torch from 2.11 on; CUDA kernels in it where there is an nvcc
# make sdist         dist/*.tar.gz, the sources
# make compat        that wheel in environments of several versions of torch, one for CUDA, made once (no GPU needed)
#
# Each makes .venv if there is none (versions: requirements.txt) and builds. On a machine that has torch and no network,
# `make demo CURRENT=1` uses the interpreter PYTHON as it is.

PYTHON ?= python3
VENV ?= .venv
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu') csrc/build.py csrc/toolchain.py setup.py pyproject.toml
COMPAT_TORCH ?= 2.13.0 2.14.1 newest

ifdef CURRENT
RUN := $(PYTHON)
READY := build/.current
else
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
endif

.PHONY: demo test lint bench gpu wheel sdist compat clean
demo: $(READY)
	$(RUN) -m ffnet demo $(ARGS)

test: $(READY) build/cuda_host/.built
	$(RUN) -m pytest $(ARGS)

lint: $(READY)
	@$(RUN) -c "import ruff, mypy" 2>/dev/null || { echo "lint: ruff or mypy is not installed, skipped"; exit 0; }; \
	$(RUN) -m ruff check . && $(RUN) -m ruff format --check . && $(RUN) -m mypy

bench: $(READY)
	$(RUN) -m benchmarks run --quick --passes 1 --out build/bench $(ARGS)

gpu: $(READY)
	$(RUN) -m benchmarks gpu $(ARGS)

# What an earlier wheel was made of goes, but for the objects in build/native.
wheel: $(READY)
	rm -rf build/lib* build/bdist* build/wheel
	$(RUN) -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheel .
	$(RUN) tools/wheel.py build/wheel dist

sdist: $(READY)
	$(RUN) setup.py --quiet sdist

compat: wheel
	$(RUN) tools/compat.py dist/*.whl $(COMPAT_TORCH) --python $(PYTHON)

# The CUDA kernels for the processor. Without them their tests skip, which says why.
build/cuda_host/.built: $(READY) $(SOURCES)
	mkdir -p $(@D)
	@$(RUN) csrc/build.py --host-cuda --out $(@D) --work $(@D)/objects && touch $@ || \
	{ rm -f $(@D)/*.so; echo "the tests run without the CUDA kernels for the processor"; }

$(VENV)/.packages: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.ready: $(VENV)/.packages $(SOURCES)
	$(VENV)/bin/python -m pip install --quiet --no-build-isolation --no-deps -e .
	touch $@

build/.current: $(SOURCES)
	mkdir -p build
	$(PYTHON) csrc/build.py --out ffnet_kernels/lib --work build/native && touch $@ || echo "running on the reference"

clean:
	rm -rf build dist *.egg-info $(VENV)/.ready ffnet_kernels/lib/*.so ffnet_kernels/lib/build_record.json
