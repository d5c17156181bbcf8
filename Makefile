# Every target works on a fresh clone: it makes .venv first, and again only when pyproject.toml changes.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
BENCH := $(VENV)/.bench
PIP_INSTALL := $(RUN) -m pip --disable-pip-version-check install -qq

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-gpu lint slow kills soak mutants bench-cpu bench-gpu bench-gpus bench-kernels bench-micro

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' Makefile

venv: $(INSTALLED)  ## .venv with everything installed

# torch goes first and pinned: on a machine without CUDA this version brings the CPU build.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	@echo "Installing into $(VENV) (a few minutes, once)"
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) torch==2.13.0
	@$(PIP_INSTALL) --editable '.[dev]'
	@touch $@

$(BENCH): $(INSTALLED)
	@DS_BUILD_OPS=0 $(PIP_INSTALL) --editable '.[bench]'
	@touch $@

demo: venv  ## train on 8 CPU processes (pipeline 2 × 2.5d of 4), then generate from the export
	@$(RUN) launch.py --nprocs 8 --config configs/opt_tiny_pp2_2p5d.py
	@$(RUN) -m colonnade generate runs/opt_tiny_pp2_2p5d/export --prompt "If the" --tokens 80 --temperature 0.8 --top-k 10 --seed 1

# One thread a process: the tests start many, and they share the cores.
test test-gpu slow kills soak mutants bench-cpu bench-micro: export OMP_NUM_THREADS = 1

# Half of the tests use one core: the tests are shared out between as many processes.
WORKERS ?= 2

test: lint  ## lint, with a GPU the tests marked gpu on it, then every test not marked slow on the CPU
	@$(RUN) -m pytest --gpu
	@$(RUN) -m pytest -n $(WORKERS) --dist worksteal

test-gpu: venv  ## the tests marked gpu alone, on a GPU of this machine
	@$(RUN) -m pytest --gpu

lint: venv  ## ruff and mypy, changing nothing
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy

slow: venv  ## the tests marked slow, and one suite under torch's own check that ranks agree on every collective
	@$(RUN) -m pytest --gpu -m slow
	@$(RUN) -m pytest -m slow
	@TORCH_DISTRIBUTED_DEBUG=DETAIL $(RUN) -m pytest tests/test_gradient_rules.py

kills: venv  ## kill runs at random moments, and see that each goes on bit for bit (15 minutes)
	@$(RUN) -m pytest -m slow tests/test_kills.py tests/test_random_kills.py

soak: venv  ## train ten thousand steps, and see that nothing grows (10 minutes)
	@$(RUN) -m pytest -m slow tests/test_soak.py

mutants: venv  ## break the code on purpose and see that the tests notice
	@$(RUN) -m tests.mutants

bench-cpu: $(BENCH)  ## tokens a second on this CPU, ours beside torch, Hugging Face, Megatron and DeepSpeed (18 minutes)
	@$(RUN) -W ignore -m benchmarks.cpu_peers

bench-gpu: venv  ## tokens a second and memory on one GPU, ours beside Hugging Face and FSDP2
	@$(RUN) -W ignore -m benchmarks.one_gpu

bench-kernels: venv  ## GB/s and µs of every fused kernel on one GPU, beside the floor, torch's and Liger-Kernel's
	@$(RUN) -W ignore -m benchmarks.kernels

bench-gpus: venv  ## parity, speed, overlap and bandwidth of every layout on all GPUs of this host (8 minutes at most)
	@$(RUN) -m torch.distributed.run --nproc-per-node gpu -m benchmarks.multi_gpu

bench-micro: $(BENCH)  ## seconds of the hot parts on this CPU, ours beside torch
	@$(RUN) -m pytest benchmarks/micro.py
