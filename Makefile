# make demo · make test · make check · make bench · make docs. Each sets up .venv first where that is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-all check bench docs setup clean

demo: $(READY)  ## train, evaluate and draw on a small generated data set: detection, then segmentation
	$(BIN)/python train_det.py
	$(BIN)/python train_seg.py

test: $(READY)  ## the tests, with coverage (minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal --cov --cov-report=term:skip-covered --cov-fail-under=90

test-all: $(READY)  ## the slow tests as well
	$(BIN)/python -m pytest -m "slow or not slow"

check: $(READY)  ## style, types, architecture
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)  ## the figures of docs/benchmarks.md that a few minutes can measure
	$(BIN)/python -m tests.benchmarks.coco_scale --images 20000
	$(BIN)/python -m tests.benchmarks.mean_iou
	$(BIN)/python -m tests.benchmarks.deeplabv3plus
	$(BIN)/python -m tests.benchmarks.activation_checkpointing
	$(BIN)/python -m tests.benchmarks.detection_loader
	$(BIN)/python -m tests.benchmarks.data_doctor
	$(BIN)/python -m tests.benchmarks.speed --skip compiled gpu --rounds 5 --train-rounds 3

docs: $(READY)  ## the documentation as a site: site/index.html, which opens without a server
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet  # the theme warns of a major version that is excluded

setup: $(READY)  ## only install

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) runs site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .coverage
