# Two commands do everything: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# where no GPU is, the CPU build of torch: TORCH_INDEX names an index that has it, if the default has not
TORCH_INDEX ?=
TORCH ?= 2.13.0

# another Triton than the environment's, which has its own golden numbers
TRITON ?= 3.6.0

.PHONY: setup demo compare test test-slow test-sweep test-triton test-laws lint format bench test-versions clean

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "torch==$(TORCH)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: setup
	$(BIN)/python examples/demo.py

compare: setup
	$(BIN)/python examples/compare.py

test: setup
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup -m "not slow and not sweep and not gpu" -p no:cacheprovider --durations=15

test-slow: setup
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup -m "slow and not gpu" -p no:cacheprovider --durations=15

test-sweep: setup
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup -m "sweep and not gpu" -p no:cacheprovider --durations=15

test-triton: setup
	$(BIN)/pip install --quiet --no-deps --upgrade --target build/triton-$(TRITON) "triton==$(TRITON)"
	PYTHONPATH=build/triton-$(TRITON) $(BIN)/python -m pytest -q -m "not slow and not sweep and not gpu" -p no:cacheprovider tests/kernels/test_ahead.py

# the laws on random models and specs: 10,000 without a compiler, 1,000 through torch.compile
test-laws: setup
	PEFTFX_EXAMPLES=10000 $(BIN)/python -m pytest -q -n 2 -k "not inductor" -p no:cacheprovider tests/laws/test_laws.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python -m benchmarks.run --device auto

test-versions:
	benchmarks/versions.sh 2.11.0 2.13.0 2.15.0

clean:
	rm -rf $(VENV) build dist *.egg-info runs
