# `make demo` and `make test` set themselves up: they need Python, a C++ compiler and the network.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*)
TREES := rbwa_fused triton_kernels tests benchmarks studies examples setup.py docs/draw_tables.py
CPP := $(wildcard csrc/*.* csrc/*/*) benchmarks/rows/*.cpp tests/*.cpp tests/*/*.cpp

.PHONY: demo test check format abi mutants sanitize soak bench gpu clean

demo: .venv/demo
	$(BIN)/python -m studies.digits

# As many processes as the machine has cores, each with files of its own, in their order.
test: .venv/dev
	$(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder
	RBWA_BENCHMARK_MODEL=squeezenet1_0 $(BIN)/python -m pytest -q benchmarks --benchmark-disable

check: .venv/dev
	$(BIN)/ruff check $(TREES)
	$(BIN)/ruff format --check $(TREES)
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy

format: .venv/dev
	$(BIN)/ruff check --fix $(TREES)
	$(BIN)/ruff format $(TREES)
	$(BIN)/clang-format -i $(CPP)

bench: .venv/dev
	$(BIN)/python -m benchmarks

# Breaks the mathematics in one place at a time; the exit status counts what no test noticed.
mutants: .venv/dev
	$(BIN)/python tests/mutate.py

# The compiled code under g++'s address and undefined-behaviour sanitizers, and proof that they look.
sanitize: .venv/dev
	$(BIN)/python tests/sanitize.py

# What takes long: thousands of random training runs, steps interrupted everywhere, runs killed
# at random moments, and every variant of Triton's kernels compiled.
soak: .venv/dev
	RBWA_PROFILE=long $(BIN)/python -m pytest -q -s tests/properties/test_properties.py
	RBWA_PROFILE=long $(BIN)/python -m pytest -q -s tests/engine/test_interrupted.py \
		tests/engine/test_interrupted_averager.py
	RBWA_PROFILE=long $(BIN)/python -m pytest -q tests/update/test_triton_compiled.py
	RBWA_KILLS=50 $(BIN)/python -m pytest -q -s tests/studies/test_crash.py \
		tests/checkpoints/test_killed.py

# On a machine with a GPU, in stages, all that needs one: tests/gpu_run.py, which needs no make.
OUT ?= build/gpu
gpu:
	$(PYTHON) tests/gpu_run.py --out '$(OUT)' $(if $(STAGES),--stages '$(STAGES)') \
		$(if $(MINUTES),--minutes $(MINUTES)) $(if $(WHEELS),--wheels '$(WHEELS)')

# One build runs on every torch from 2.10 on: built against the newest, tested under an older one,
# and with the oldest Triton that the kernels are meant for.
abi: .venv/dev
	$(BIN)/pip wheel -q --no-build-isolation --no-deps -w build/abi .
	$(PYTHON) -m venv .venv-abi
	.venv-abi/bin/pip install -q torch==2.13.0 triton==3.6.0 numpy pytest
	.venv-abi/bin/pip install -q --no-deps --force-reinstall build/abi/rbwa_fused-*.whl
	cd tests && ../.venv-abi/bin/python -P -m rbwa_fused
	cd tests && ../.venv-abi/bin/python -P -m pytest -q update/test_update.py \
		update/test_methods.py update/test_ops.py \
		distributed/test_fsdp.py distributed/test_tensor_parallel.py
	cd tests && ../.venv-abi/bin/python -P -m pytest -q update/test_triton.py \
		update/test_triton_compiled.py

clean:
	rm -rf .venv .venv-abi build *.egg-info rbwa_fused/*.so

.venv/torch:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q 'setuptools>=77' ninja pybind11 torch torchvision
	touch $@

.venv/demo: .venv/torch $(SOURCES)
	$(BIN)/pip install -q --no-build-isolation -e '.[demo]'
	touch $@

.venv/dev: .venv/torch $(SOURCES)
	$(BIN)/pip install -q --no-build-isolation -e '.[demo,bench,dev]'
	touch $@
