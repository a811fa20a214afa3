# make demo                       the whole pipeline on drawn faces
# make demo CELEBA_ROOT=PATH      the same on CelebA
# make test                       the tests
# make test-browser, test-slurm   reports in Chromium; jobs on a two-node SLURM started for it
# make test-faults                kills and corrupts runs
# make soak                       trains under 200 random faults (DRAWS, MINUTES, SEED)
# make results                    docs/results.md from docs/benchmarks
# PYTHON=python3 uses that interpreter as it is and installs nothing (test-gpu, bench, bench-gpu).

VENV := .venv
PYTHON ?= $(VENV)/bin/python
SYSTEM_PYTHON ?= python3

ifeq ($(PYTHON),$(VENV)/bin/python)
SETUP := $(VENV)/.done
PEERS := $(VENV)/.peers
ENGINES := $(VENV)/.engines
BROWSER := $(VENV)/.browser
endif

.PHONY: demo test check setup test-browser test-faults soak test-slurm test-gpu bench bench-gpu results golden tensorboard clean

demo: $(SETUP)
ifdef CELEBA_ROOT
	$(PYTHON) pipeline/run_all.py --config configs/demo/run_all.yaml \
		--source celeba --root "$(CELEBA_ROOT)" --out runs/demo-celeba
else
	$(PYTHON) pipeline/run_all.py --config configs/demo/run_all.yaml
endif

test: $(ENGINES)
	$(PYTHON) -m pytest -n 2 -m "not gpu and not slurm and not faults and not browser"

check: $(ENGINES)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) benchmarks/results.py --check
	$(PYTHON) -m pyright --pythonpath $(PYTHON)

setup: $(SETUP)

$(VENV)/.done: pyproject.toml constraints.txt
	$(SYSTEM_PYTHON) -c 'import sys; sys.version_info < (3, 11) and sys.exit("Python 3.11 or newer is needed")'
	$(SYSTEM_PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt '.[dev]'
	rm -rf build *.egg-info
	touch $@

$(VENV)/.engines: $(SETUP)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt '.[deepspeed]'
	rm -rf build *.egg-info
	touch $@

$(VENV)/.peers: $(SETUP)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt '.[bench]'
	rm -rf build *.egg-info
	touch $@

$(VENV)/.browser: $(SETUP)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt '.[browser]'
	rm -rf build *.egg-info
	touch $@

test-browser: $(BROWSER)
	$(PYTHON) -m pytest -m browser tests/test_browser.py

test-faults: $(ENGINES)
	$(PYTHON) -m pytest -m faults

DRAWS ?= 200
MINUTES ?= 60
SEED ?= 0

soak: $(SETUP)
	$(PYTHON) benchmarks/soak.py --draws $(DRAWS) --minutes $(MINUTES) --seed $(SEED) \
		--json runs/bench/soak.json

test-slurm: $(ENGINES)
	$(PYTHON) -m pytest -m slurm tests/test_slurm.py

test-gpu: $(SETUP)
	$(PYTHON) -m pytest tests/test_gpu.py tests/test_kernels.py

BENCHMARKS := nearest_code codebook_sums quantizer_step train_step sampling features

bench: $(PEERS)
	for name in $(BENCHMARKS); do \
		$(PYTHON) benchmarks/$$name.py --json runs/bench/$$name-cpu.json || exit 1; done
	$(PYTHON) benchmarks/tune_nearest_code.py --check --json runs/bench/kernels.json

bench-gpu: $(PEERS)
	for name in $(BENCHMARKS); do \
		$(PYTHON) benchmarks/$$name.py --device cuda --json runs/bench/$$name-cuda.json || exit 1; \
	done

results: $(SETUP)
	$(PYTHON) benchmarks/results.py

golden: $(SETUP)
	PYTHONPATH=. $(PYTHON) tests/test_golden.py

tensorboard: $(SETUP)
	$(PYTHON) -m tensorboard.main --logdir runs --host localhost

clean:
	rm -rf $(VENV)
