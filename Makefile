# Everything runs in .venv, made on first use from this folder's own files. What it is made of may be overridden:
#   make test VENV=.venv-5.17 TRANSFORMERS=transformers==5.17.0
PYTHON ?= python3
TORCH ?= torch==2.13.0
TRANSFORMERS ?= transformers==5.23.0
VENV ?= .venv
BIN := $(VENV)/bin
OLDEST_TRITON := triton==3.6.0
# For the tests of quantised loading; apart, since transformers imports them wherever they are installed, which takes a second.
QUANTISERS := torchao==0.18.0 bitsandbytes==0.50.2
PATHS := kernels aligngpt training demo experiments benchmarks tests setup.py

.PHONY: install demo evidence check format test test-all test-compile test-gpu clean
.PHONY: bench bench-gpu bench-record bench-check bench-report

install: $(VENV)/.installed

$(VENV)/.installed: setup.py pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]" "$(TRANSFORMERS)"
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/quantisers $(QUANTISERS)
	touch $@

demo: install
	$(BIN)/python -m demo

# Hours; it goes on from where it stopped. Options of `python -m experiments` go in EVIDENCE:
#   make evidence EVIDENCE="--sizes large"
evidence: install
	$(BIN)/python -m experiments $(EVIDENCE)

check: install
	$(BIN)/ruff check $(PATHS)
	$(BIN)/ruff format --check $(PATHS)
	$(BIN)/mypy kernels/aligngpt_kernels aligngpt training demo experiments benchmarks

format: install
	$(BIN)/ruff check --fix $(PATHS)
	$(BIN)/ruff format $(PATHS)

# Files of tests share the cores: JOBS processes, one thread each.
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test: install
	$(PYTEST) tests -m "not slow and not gpu"

test-all: install
	$(PYTEST) tests -m "not gpu"

# Every row of the kernels' tile tables, compiled for chips that are not there, by the newest and the oldest Triton;
# then the kernels' tests in the oldest one's interpreter.
test-compile: install .venv-triton/.installed
	$(BIN)/python -m pytest tests/kernels/test_compiled.py
	PYTHONPATH=kernels:. .venv-triton/bin/python -m pytest tests/kernels

.venv-triton/.installed: Makefile
	$(PYTHON) -m venv --clear .venv-triton
	.venv-triton/bin/python -m pip install --quiet --upgrade pip
	.venv-triton/bin/python -m pip install --quiet "$(TORCH)"
	.venv-triton/bin/python -m pip install --quiet "$(OLDEST_TRITON)" "numpy<2.4" pytest hypothesis safetensors
	touch $@

# The next two use the python3 that is there, install nothing, end within 8 minutes, and go on from where they stopped:
# RESULTS keeps the names of the tests that passed with this code, and the measurements.
RESULTS ?= benchmarks/results
GPU_ENV := PYTHONPATH=kernels:.
DALI_TESTS := tests/training/test_dali_pipeline.py
ANSWERING_TESTS := tests/aligngpt/test_attention.py tests/aligngpt/test_decoding.py tests/aligngpt/test_engine.py

test-gpu:
	@$(GPU_ENV) $(PYTHON) -m benchmarks.need_gpu "make test-gpu"
	mkdir -p $(RESULTS)
	$(GPU_ENV) timeout --kill-after=10 380 $(PYTHON) -m pytest tests/kernels --ignore=tests/kernels/test_compiled.py \
		--resume=$(RESULTS)/passed_tests.txt --stop-after=335
	@if $(PYTHON) -c "import nvidia.dali" 2>/dev/null; \
	then $(GPU_ENV) timeout --kill-after=10 40 $(PYTHON) -m pytest $(DALI_TESTS) -m gpu; \
	else echo "left out: $(DALI_TESTS), the package nvidia.dali is not installed"; fi
	$(GPU_ENV) timeout --kill-after=10 100 $(PYTHON) -m pytest $(ANSWERING_TESTS) -m gpu

bench: install
	$(BIN)/python -m pytest benchmarks

bench-gpu:
	@$(GPU_ENV) $(PYTHON) -m benchmarks.need_gpu "make bench-gpu"
	$(GPU_ENV) $(PYTHON) -m benchmarks.run --results $(RESULTS) --probe-seconds 4

# Every case on this machine, whatever it has, into RESULTS; it goes on from where it stopped.
SECONDS ?= 3600
bench-record: install
	$(BIN)/python -m benchmarks.run --full --results $(RESULTS) --seconds $(SECONDS)

bench-check: install
	$(BIN)/python -m benchmarks.check

bench-report: install
	$(BIN)/python -m benchmarks.report

clean:
	rm -rf .venv* build *.egg-info
