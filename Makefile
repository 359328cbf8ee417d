# make demo · make test · make check · make bench: each sets itself up in .venv on a fresh machine. make test-gpu does not.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python

# Which torch to install first. Without a GPU, a fixed release, of which pip's own settings can name a CPU build; where
# they name none, an index may give the one with CUDA (TORCH=… asks for another: a version, a file, an address).
# In Gaudi's container, none: its own torch is used, so the environment sees the system's packages.
ifneq ($(wildcard /dev/accel/accel0),)
TORCH ?=
VENV_FLAGS := --system-site-packages
else ifneq ($(wildcard /dev/nvidiactl),)
TORCH ?= torch
else
TORCH ?= torch==2.13.0
endif

.PHONY: demo test test-gpu check bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/plots
	$(PY) bench/demo.py

# each process takes one thread, so as many as there are cores; a file's tests stay together, and files go in their own
# order: by their number of tests, which xdist prefers, some of the longest come last and alone
test: $(VENV)/test
	$(PY) -m pytest -n auto --dist loadfile --no-loadscope-reorder

# what only a card can show: with .venv where it is, else with PYTHON as it is, which needs torch, triton and pytest
test-gpu:
	$(if $(wildcard $(PY)),$(PY),$(PYTHON)) -m pytest -rs -W default tests/test_cuda.py tests/test_device.py tests/test_attention.py

check: $(VENV)/test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(PY) -m pytest -m "not slow"

# 8 minutes, 20 GB of disk: a 7B of random weights
bench: $(VENV)/plots
	$(PY) bench/quantise.py

clean:
	rm -rf $(VENV) build dist *.egg-info

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	$(if $(TORCH),$(VENV)/bin/pip install --quiet $(TORCH))
	touch $@

$(VENV)/plots: $(VENV)/torch pyproject.toml
	$(VENV)/bin/pip install --quiet -e ".[plots]"
	touch $@

$(VENV)/test: $(VENV)/torch pyproject.toml
	$(VENV)/bin/pip install --quiet -e ".[test,oracle]"
	touch $@
