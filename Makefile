# make demo          FFNet-1 on photographs: plain PyTorch against the kernels; two minutes, most of it the build
# make test          the tests to run at every change, lint and types among them: minutes
# make test-all      all tests, sanitizers, every instruction set and GPU architecture among them: an hour on two cores
# make lint          lint and types only
# make bench         the quick benchmark suite, minutes: tables, report and charts in build/bench
# make timm          a table of timm's models, plain and optimised, in an environment made once (5.5 GB) in build/timm
# make cuda          the CUDA kernels for every GPU, or those of FFNET_CUDA_ARCHS; `make demo` makes those of this machine's
# make gpu           on a GPU: checks and benchmarks of the CUDA and Triton kernels, in nine minutes
# make wheel         dist/*.whl, for any Python and any torch from 2.11 on; CUDA kernels in it where there is an nvcc
# make sdist         dist/*.tar.gz, the sources
# make docs          the documentation as a site, in build/site
# make compat        that wheel in environments of several versions of torch, one for CUDA, made once (no GPU needed)
#
# Each makes .venv if there is none (versions: requirements*.txt) and builds for this machine when the sources changed; what
# `make cuda` or `make test-all` built for others goes then. On a machine that has torch and no network, `make demo
# CURRENT=1` uses the interpreter PYTHON as it is.

PYTHON ?= python3
VENV ?= .venv
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu') csrc/build.py csrc/toolchain.py \
  ffnet_kernels/ops/schemas.py setup.py pyproject.toml
COMPAT_TORCH ?= 2.13.0 2.14.1 newest
TIMM_PACKAGES := timm==1.0.31 torch==2.14.1 torchvision==0.29.1
FOR_EVERY_GPU := FFNET_CUDA_ARCHS='$(or $(FFNET_CUDA_ARCHS),all)'
FOR_EVERY_MACHINE := FFNET_CPU_ISAS='$(or $(FFNET_CPU_ISAS),all)' $(FOR_EVERY_GPU)

ifdef CURRENT
RUN := $(PYTHON)
READY := build/.current
TOOLS :=
else
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
TOOLS := $(VENV)/.tools
endif
# A process a core, where pytest-xdist is there.
PYTEST = $(RUN) -m pytest $$($(RUN) -c "import xdist; print('-n auto --maxprocesses 8 --dist loadscope \
--no-loadscope-reorder')" 2>/dev/null)
BUILD := $(RUN) csrc/build.py --out ffnet_kernels/lib --work build/native

.PHONY: demo test test-all lint bench timm cuda gpu wheel sdist compat docs clean
demo: $(READY)
	@$(RUN) -m ffnet demo $(ARGS)

test: $(READY) $(TOOLS) build/cuda_host/.built
	$(PYTEST) -m "not long" --hypothesis-profile quick $(ARGS)

test-all: $(READY) $(TOOLS) build/cuda_host/.built
	$(FOR_EVERY_MACHINE) $(BUILD) || [ $$? -eq 1 ]
	env -u FFNET_CPU_ISAS -u FFNET_CUDA_ARCHS $(PYTEST) $(ARGS)

lint: $(READY) $(TOOLS)
	@$(RUN) -c "import ruff, mypy" 2>/dev/null || { echo "lint: ruff or mypy is not installed, skipped"; exit 0; }; \
	$(RUN) -m ruff check . && $(RUN) -m ruff format --check . && $(RUN) -m mypy

bench: $(READY)
	$(RUN) -m benchmarks run --quick --passes 1 --out build/bench $(ARGS)

timm: $(READY) build/timm/.ready
	build/timm/bin/python -m benchmarks timm --out build/timm.json $(ARGS)

cuda: $(READY)
	$(FOR_EVERY_GPU) $(BUILD)

gpu: $(READY)
	$(RUN) -m benchmarks gpu $(ARGS)

# What an earlier wheel was made of goes, but for the objects in build/native.
wheel: $(READY) $(TOOLS)
	rm -rf build/lib* build/bdist* build/wheel
	$(FOR_EVERY_MACHINE) $(RUN) -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheel .
	$(RUN) tools/wheel.py build/wheel dist

sdist: $(READY)
	$(RUN) setup.py --quiet sdist

compat: wheel
	$(RUN) tools/compat.py dist/*.whl $(COMPAT_TORCH) --python $(PYTHON)

# The docstrings are read from the sources, so nothing has to be built for it. The banner of its theme is silenced.
docs: build/docs/.ready
	NO_MKDOCS_2_WARNING=1 build/docs/bin/python -m mkdocs build --strict --quiet && echo "wrote build/site/index.html"

# The CUDA kernels for the processor. Without them their tests skip, which says why.
build/cuda_host/.built: $(READY) $(SOURCES)
	@mkdir -p $(@D)
	@echo "building the CUDA kernels for the processor, for tests"
	@$(RUN) csrc/build.py --host-cuda --out $(@D) --work $(@D)/objects && touch $@ || \
	{ rm -f $(@D)/*.so; echo "the tests run without the CUDA kernels for the processor"; }

# What pip warns of is shown where it fails. Compiling all to bytecode would take longer than installing it.
LOG = build/install$(@F).log
INSTALL = mkdir -p build; $(VENV)/bin/python -m pip install --disable-pip-version-check --no-compile -r $(1) \
2> $(LOG) && touch $@ || { cat $(LOG); exit 1; }

$(VENV)/.packages: requirements.txt
	$(PYTHON) -m venv $(VENV)
	@$(call INSTALL,requirements.txt)

# torchvision, which timm imports, is made for one version of torch; the kernels are loaded from this tree.
build/timm/.ready:
	$(PYTHON) -m venv build/timm
	build/timm/bin/python -m pip install --disable-pip-version-check --no-compile $(TIMM_PACKAGES) && touch $@

build/docs/.ready: requirements-docs.txt
	$(PYTHON) -m venv build/docs
	build/docs/bin/python -m pip install --disable-pip-version-check -r requirements-docs.txt && touch $@

$(VENV)/.tools: requirements-dev.txt $(VENV)/.packages | $(VENV)/.ready
	@$(call INSTALL,requirements-dev.txt)

# Built before pip builds it once more from the same objects: pip hides how far it is. Where it cannot be built (1), the
# package runs on its reference; anything else is a request that is wrong.
$(VENV)/.ready: $(VENV)/.packages $(SOURCES)
	@echo "building the kernels for this machine"
	@$(BUILD) || [ $$? -eq 1 ]
	@mkdir -p build
	@$(RUN) -m pip install --disable-pip-version-check --no-build-isolation --no-deps -e . > $(LOG) 2>&1 \
	|| { cat $(LOG); exit 1; }
	@touch $@

build/.current: $(SOURCES)
	@mkdir -p build
	@$(BUILD) && touch $@ || { [ $$? -eq 1 ] && echo "running on the reference"; }

clean:
	rm -rf build dist *.egg-info $(VENV)/.ready ffnet_kernels/lib/*.so ffnet_kernels/lib/build_record.json
