# make demo | test | test-slow | lint | bench | metal | clean. Each sets up all that it needs, in .venv.
# Options: PYTHON=python3.12, VENV=.venv, MLX=cuda13 (on a machine with an NVIDIA GPU; default cpu on Linux),
# JOBS=1 (processes of make test; default one for each processor, up to four)

PYTHON ?= python3
VENV ?= .venv
MLX ?= $(if $(filter Linux,$(shell uname -s)),cpu)
BIN := $(VENV)/bin
SOURCES := CMakeLists.txt pyproject.toml $(shell find csrc src cmake metal -type f)
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check

.PHONY: demo test test-slow lint bench metal test-peers bench-peers clean

demo: $(VENV)/installed
	$(BIN)/mlxsae demo

# Each process takes whole files, so that what a module sets up is set up once. test-slow runs what is marked slow: a wheel in an
# environment of its own, every kernel through nvcc's compiler, the search for barriers that nothing needs, another processor's kernels.
JOBS ?= auto
PYTEST = $(BIN)/python -m pytest tests -n $(JOBS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder
test: $(VENV)/installed-test
	$(PYTEST) -m "not slow"
test-slow: $(VENV)/installed-test
	$(PYTEST) -m slow

lint: $(VENV)/installed-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	find csrc src tests/cpp tests/metal tests/cuda -name '*.h' -o -name '*.cpp' | xargs $(BIN)/clang-format --dry-run --Werror

# SHAPES=S0,S1,S2 and others of benchmarks/shapes.py.
SHAPES ?= S0,S1
bench: $(VENV)/installed-test
	$(BIN)/python -m pytest benchmarks --benchmark-only --shapes $(SHAPES) --benchmark-json=benchmark.json

# Every kernel through Apple's compiler, for the oldest system that we support (a Mac with Xcode; no part of the build).
METAL := xcrun --sdk macosx metal -std=metal3.1 -mmacosx-version-min=14.0 -Wall -Imetal
metal: $(patsubst metal/%.metal,build/metal/%.air,$(wildcard metal/*.metal))
	xcrun --sdk macosx metallib $^ -o build/metal/mlxsae.metallib

build/metal/%.air: metal/%.metal $(wildcard metal/*.h metal/common/*.h)
	@mkdir -p $(@D)
	$(METAL) -c $< -o $@

# The field's libraries, in an environment of their own: as oracles, and beside us in one contest for each of PEER_SHAPES.
PEERS := .venv-peers
PEER_SHAPES ?= S1 S2
test-peers: $(PEERS)/installed-peers
	$(PEERS)/bin/python -m pytest tests/peers -m peers

bench-peers: $(PEERS)/installed-peers
	for shape in $(PEER_SHAPES); do $(PEERS)/bin/python -m benchmarks.peers.run --shape $$shape || exit 1; done
	$(PEERS)/bin/python -m benchmarks.table

# A fresh Debian has neither venv nor the headers that a C++ module needs.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "mlxsae needs Python 3.11 or newer; name one: make PYTHON=python3.12"; exit 1; }
	@c++ --version >/dev/null 2>&1 || { echo "mlxsae needs a C++20 compiler (Debian: g++; macOS: xcode-select --install)"; exit 1; }
	@{ $(PYTHON) -c 'import ensurepip, venv' && \
	   test -e "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h"; } 2>/dev/null || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	    apt-get update -q && apt-get install -qy python3-venv python3-dev; } || \
	  { echo "mlxsae needs Python's venv and headers (Debian: apt-get install python3-venv python3-dev)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Editable, so that Python code runs from this checkout; C++ is rebuilt when it changes.
$(VENV)/installed: $(SOURCES) | $(BIN)/python
	$(PIP) -e ".$(if $(MLX),[$(MLX)])"
	@touch $@

# The requirements of an extra, without building again what they are extras of.
REQUIRED := $(BIN)/python -c 'import re, sys, importlib.metadata as m; print(*(r.split(";")[0].strip() \
  for r in m.requires("mlxsae") if re.search(f"extra == .{sys.argv[1]}.$$", r) and not r.startswith("mlxsae")))'

$(VENV)/installed-test: $(VENV)/installed
	$(PIP) $$($(REQUIRED) test) cmake nanobind==3.1.0
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed-test
	$(PIP) $$($(REQUIRED) dev)
	@touch $@

# What it does not have it finds in $(VENV), so our library is compiled once.
SITE := python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
$(PEERS)/installed-peers: benchmarks/peers/requirements-peers.txt | $(VENV)/installed-test
	test -e $(PEERS)/bin/python || $(BIN)/python -m venv $(PEERS)
	echo "import site; site.addsitedir('$$($(BIN)/$(SITE))')" > "$$($(PEERS)/bin/$(SITE))/mlxsae.pth"
	$(PEERS)/bin/python -m pip install -q --disable-pip-version-check -r benchmarks/peers/requirements-peers.txt
	$(PEERS)/bin/python -m pip uninstall -qy torchvision
	$(PEERS)/bin/python -m pip install -q --disable-pip-version-check --no-deps circuit-tracer==0.5.0
	@touch $@

clean:
	rm -rf $(VENV) $(PEERS) build dist
