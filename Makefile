# `make demo` and `make test` set themselves up: they need Python, a C++ compiler and the network.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := setup.py pyproject.toml $(wildcard csrc/*)
TREES := rbwa_fused tests benchmarks examples setup.py

.PHONY: demo test check format abi bench clean

demo: .venv/demo
	$(BIN)/python -m examples.train

test: .venv/dev
	$(BIN)/python -m pytest -q

check: .venv/dev
	$(BIN)/ruff check $(TREES)
	$(BIN)/ruff format --check $(TREES)
	$(BIN)/clang-format --dry-run --Werror csrc/* benchmarks/*.cpp
	$(BIN)/mypy

format: .venv/dev
	$(BIN)/ruff check --fix $(TREES)
	$(BIN)/ruff format $(TREES)
	$(BIN)/clang-format -i csrc/* benchmarks/*.cpp

bench: .venv/dev
	$(BIN)/python -m benchmarks.step

# One build runs on every torch from 2.10 on: built against the newest, tested under an older one.
abi: .venv/dev
	$(BIN)/pip wheel -q --no-build-isolation --no-deps -w build/abi .
	$(PYTHON) -m venv .venv-abi
	.venv-abi/bin/pip install -q torch==2.13.0 numpy pytest
	.venv-abi/bin/pip install -q --no-deps --force-reinstall build/abi/rbwa_fused-*.whl
	cd tests && ../.venv-abi/bin/python -P -m rbwa_fused
	cd tests && ../.venv-abi/bin/python -P -m pytest -q test_update.py test_methods.py test_ops.py

clean:
	rm -rf .venv .venv-abi build *.egg-info rbwa_fused/*.so

.venv/torch:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q 'setuptools>=77' ninja torch torchvision
	touch $@

.venv/demo: .venv/torch $(SOURCES)
	$(BIN)/pip install -q --no-build-isolation -e '.[demo]'
	touch $@

.venv/dev: .venv/torch $(SOURCES)
	$(BIN)/pip install -q --no-build-isolation -e '.[demo,bench,dev]'
	touch $@
