# Everything a person or a CI machine runs goes through here; `make help` lists it.

MODEL  ?= smollm2-135m
DEVICE ?= cpu
TIER   ?= all
CUDA   ?= auto
Q      := $(if $(V),,@)
CC     := $(if $(filter default,$(origin CC)),cc,$(CC))

# VENV=system uses the python3 in PATH with the packages it has (a GPU machine without network); otherwise
# a .venv with the pinned ones is made on first use.
ifeq ($(VENV),system)
PYTHON := python3
CLANG_FORMAT := clang-format
PACKAGES :=
else
PYTHON := .venv/bin/python
CLANG_FORMAT := .venv/bin/clang-format
PACKAGES := .venv/.installed
endif

# nvcc: CUDA_HOME, then PATH, then the PyPI toolkit in the environment. CUDA=wheel takes only the last, and
# fetches it where it is missing; CUDA=none builds the twin alone. Relative, for paths with spaces.
WHEEL_CUDA := $(shell $(PYTHON) -c "import os, nvidia.cu13 as c; print(os.path.relpath(list(c.__path__)[0]))" 2>/dev/null)
WHEEL_NVCC := $(wildcard $(WHEEL_CUDA)/bin/nvcc)
ifeq ($(CUDA),none)
NVCC :=
else ifeq ($(CUDA),wheel)
NVCC := $(WHEEL_NVCC)
else
NVCC := $(firstword $(wildcard $(CUDA_HOME)/bin/nvcc) $(shell command -v nvcc 2>/dev/null) $(WHEEL_NVCC))
endif

LIBRARY := engine/libengine.so
CFLAGS  := -std=gnu11 -O3 -g0 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra -Werror -Wno-psabi -pthread
NVFLAGS := -std=c++17 -O3 -gencode=arch=compute_90a,code=sm_90a -fmad=false -Werror all-warnings \
           -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra

C_FILES := $(wildcard csrc/twin/*.c csrc/model/*.c csrc/runtime/*.c)
ifeq ($(NVCC),)
C_FILES += csrc/kernels/no_cuda.c
CU_FILES :=
LINK = $(CC) -shared -pthread -Wl,--no-undefined -o $@ $(OBJECTS) -lm
else
C_FILES += $(filter-out csrc/kernels/no_cuda.c,$(wildcard csrc/kernels/*.c))
CU_FILES := $(wildcard csrc/kernels/*.cu)
NVCC_ROOT := $(if $(filter $(NVCC),$(WHEEL_NVCC)),$(WHEEL_CUDA),$(patsubst %/bin/,%,$(dir $(realpath $(NVCC)))))
# The wheel's toolkit keeps its libraries in lib, a system's in lib64; naming both serves either.
LINK = "$(NVCC)" -shared -cudart static -L"$(NVCC_ROOT)/lib" -L"$(NVCC_ROOT)/lib64" -Xcompiler -pthread \
       -Xlinker --no-undefined -o $@ $(OBJECTS) -lm
endif
OBJECTS := $(patsubst csrc/%,build/%.o,$(C_FILES) $(CU_FILES))

.DEFAULT_GOAL := build
.PHONY: help build verify verify-op test test-deep mutants localise false-alarms teeth properties evidence golden record-gpu sanitize sanitize-cpu lint format clean FORCE
.PHONY: bench bench-gpu bench-compare bench-table

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' Makefile
	@echo "  variables          MODEL=$(MODEL) DEVICE=$(DEVICE) TIER=$(TIER) CUDA=auto|none|wheel VENV=system V=1"
	@echo "  ARGS               options, as in make verify ARGS='--layers 0,3-5'; ARGS=--help lists them"

build: $(LIBRARY)  ## the engine's library; with nvcc both backends, without it the CPU twin alone

verify: $(LIBRARY) $(PACKAGES)  ## every operator of every layer against transformers: the verdict table
	@$(PYTHON) -m verification --model "$(MODEL)" --device $(DEVICE) $(ARGS)

test: $(LIBRARY) $(PACKAGES)  ## the tests; TIER=fast leaves out the slow ones
	$(PYTHON) -m pytest $(if $(filter fast,$(TIER)),-m "not slow and not deep") $(ARGS)

test-deep: $(LIBRARY) $(PACKAGES)  ## serving's random and exhaustive tests with many more examples, fresh each time
	$(PYTHON) -m pytest -m deep --hypothesis-profile=deep tests/engine tests/system $(ARGS)

mutants: $(LIBRARY) $(PACKAGES)  ## plant every fault of the catalogue in turn: all must be found and named
	$(PYTHON) -m verification.mutants $(ARGS)

teeth: $(LIBRARY) $(PACKAGES)  ## the kill matrix: faults by hand, of the museum, generated; goes on if stopped
	$(PYTHON) -m verification.teeth --device $(DEVICE) $(ARGS)

properties: $(LIBRARY) $(PACKAGES)  ## which planted faults each metamorphic property finds, and which it alone
	$(PYTHON) -m verification.teeth.properties $(ARGS)

evidence: $(PACKAGES)  ## docs/evidence.md, made of the records of the last runs in docs/evidence/
	@$(PYTHON) -m verification.evidence_page $(ARGS)

verify-op: $(LIBRARY) $(PACKAGES)  ## a shared object of yours: make verify-op OP=rms_norm LIB=./mine.so
	$(if $(and $(OP),$(LIB)),,$(error what to verify is missing: make verify-op OP=rms_norm LIB=./mine.so))
	@$(PYTHON) -m verification.verify_op "$(OP)" "$(LIB)"

localise: $(LIBRARY) $(PACKAGES)  ## a fault at every operator of every layer: named first? goes on where stopped
	@$(PYTHON) -m verification.localisation --model "$(MODEL)" $(ARGS)

false-alarms: $(LIBRARY) $(PACKAGES)  ## correct engines of other arithmetic: none may be failed
	@$(PYTHON) -m verification.false_alarms $(ARGS)

golden: $(LIBRARY) $(PACKAGES)  ## record golden/ again; refuses a dirty tree, shows what changed
	$(PYTHON) -m verification.record $(ARGS)

record-gpu: $(LIBRARY) $(PACKAGES)  ## on a GPU machine: its bits, tests, sanitizers and speed into golden/h200
	NVCC="$(NVCC)" $(PYTHON) -m verification.record_gpu $(ARGS)

sanitize: $(LIBRARY) $(PACKAGES)  ## four sanitizers over every kernel, each after its planted defect
	NVCC="$(NVCC)" $(PYTHON) -m verification.sanitizers $(ARGS)

# Built over the library, so that what is tested is what is measured; the last line builds it anew.
sanitize-cpu: $(PACKAGES)  ## C's tests under the compiler's sanitizers: addresses, undefined behaviour
	@$(MAKE) --no-print-directory build CUDA=none \
	  CC="$(CC) -g -fsanitize=address,undefined -fno-sanitize-recover=undefined"
	LD_PRELOAD="$$($(CC) -print-file-name=libasan.so)" ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
	  $(PYTHON) -m pytest --capture=sys -m "not slow and not gpu" \
	  $(or $(TESTS),tests/twin tests/runtime tests/model tests/system) $(ARGS)
	@$(MAKE) --no-print-directory build

BENCH = NVCC="$(NVCC)" $(PYTHON) -m pytest --benchmark-only -o addopts="--import-mode=importlib" -q -rs
bench: $(LIBRARY) $(PACKAGES)  ## benchmarks of the operators and of the engine, on a GPU with its peers
	$(BENCH) tests/benchmarks $(ARGS)

bench-gpu: $(LIBRARY) $(PACKAGES)  ## the GPU's alone: every point, the peers by turns, into build/bench.json
	$(BENCH) tests/benchmarks/test_bench_gpu.py $(ARGS)

bench-compare: bench-gpu  ## fails on a regression beyond noise; BENCH_BASE=DIR times that checkout too
	$(PYTHON) -m tests.benchmarks.compare

bench-table: $(PACKAGES)  ## the recorded benchmarks as a table, and docs/benchmarks.svg
	$(PYTHON) -m tests.benchmarks.table $(ARGS)

lint: $(PACKAGES)  ## ruff and clang-format, checking only
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	find csrc \( -name '*.[ch]' -o -name '*.cu' -o -name '*.cuh' \) -print0 | xargs -0 $(CLANG_FORMAT) --dry-run -Werror

format: $(PACKAGES)  ## ruff and clang-format, rewriting
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	find csrc \( -name '*.[ch]' -o -name '*.cu' -o -name '*.cuh' \) -print0 | xargs -0 $(CLANG_FORMAT) -i

clean:  ## what was built; .venv and the model cache stay
	rm -rf build engine/libengine.so verify.json verify.html

# The environment: made once, made again when the pins change.
.venv/.installed: requirements.txt
	@python3 -c 'import sys; v = sys.version_info[:2]; \
	  sys.exit(v < (3, 11) and "Python 3.11 or later is needed, python3 is %d.%d" % v)'
	@echo "making .venv with the pinned packages (once; a few minutes)"
	@python3 -m venv .venv
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

# Written on every run, changed only when its content changes: what the objects were built from and with.
build/source_stamp: FORCE
	@mkdir -p build && python3 engine/source_stamp.py > $@.new
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@
build/flags: FORCE
	@mkdir -p build && echo '$(CC) $(CFLAGS) $(NVCC) $(NVFLAGS) $(OBJECTS)' > $@.new
	@cmp -s $@.new $@ && rm $@.new || { mv $@.new $@; \
	  echo "$(if $(NVCC),building the CPU twin and the CUDA kernels ($(NVCC)),building the CPU twin alone: no nvcc found)"; }

build/%.c.o: csrc/%.c build/flags
	@mkdir -p $(@D) && echo "  cc    $<"
	$(Q)$(CC) $(CFLAGS) -MMD -MP -c $< -o $@
build/runtime/status.c.o: CFLAGS += -DBUILT_WITH_CUDA=$(if $(NVCC),1,0) -DSOURCE_STAMP='"$(shell cat build/source_stamp 2>/dev/null)"'
build/runtime/status.c.o: build/source_stamp
build/%.cu.o: csrc/%.cu build/flags
	@mkdir -p $(@D) && echo "  nvcc  $<"
	$(Q)"$(NVCC)" $(NVFLAGS) -MMD -MP -c $< -o $@

ifeq ($(CUDA)$(NVCC),wheel)
$(LIBRARY): $(PACKAGES)
	@echo "fetching the CUDA toolkit's wheels (once)"
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check "cuda-toolkit[nvcc,crt,nvvm,cudart,cccl]==13.0.2"
	@$(MAKE) --no-print-directory CUDA=wheel $@
else
$(LIBRARY): $(OBJECTS)
	@echo "  link  $@"
	$(Q)$(LINK)
endif

-include $(OBJECTS:.o=.d)
