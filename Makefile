# `make demo` and `make test` are all that is needed: each sets everything up first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/ready
SEEDS ?= 0-2
# For tests alone, and without its requirements: those are in the extra yolo-tests (pyproject.toml).
ULTRALYTICS := ultralytics ultralytics-thop ultralytics-platform

.PHONY: help setup demo test lint types docs check wheel test-wheel test-floor clean

help:
	@echo "make demo        train, compare, report (runs/demo/report.html) and cut on the bundled digits"
	@echo "make docs        the pages in site/ (site/index.html), without a network; a warning is an error"
	@echo "make test        lint, types and the tests, the pages among them; the report in a browser too after: apt-get install chromium"
	@echo "make wheel       the wheel and the source archive, in dist/"
	@echo "make test-wheel  the wheel installed in an empty environment (.venv-wheel), and used there"
	@echo "make test-floor  the tests with the oldest PyTorch that is admitted (.venv-floor)"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps $(ULTRALYTICS)
	touch $@

demo: $(READY)
	$(BIN)/regrow compare --data digits --model convnet --epochs 60 --methods standard,repr,bridgeout --p 0.1 \
		--seeds $(SEEDS) --out runs/demo
	$(BIN)/regrow curve runs/demo
	$(BIN)/regrow prune runs/demo/standard-seed0 --max-drop 1 --out runs/demo-pruned
	$(BIN)/regrow report runs/demo
	$(BIN)/regrow prune runs/demo/standard-seed0 --macs 0.5 --out runs/demo-half

test: $(READY) lint types check

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

check: $(READY)
	$(BIN)/python scripts/fetch_fashion_mnist.py
	$(BIN)/pytest --numprocesses auto --dist loadfile

wheel: $(READY)
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist

# Each environment takes about 6 GB while it is tried, where PyTorch's build for GPUs is installed.
test-wheel: wheel
	rm -rf .venv-wheel
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/pip install --quiet --disable-pip-version-check -c constraints.txt dist/regrow-*.whl
	.venv-wheel/bin/regrow --help
	.venv-wheel/bin/python scripts/try_wheel.py
	.venv-wheel/bin/pip install --quiet --disable-pip-version-check -c constraints.txt "$$(ls dist/regrow-*.whl)[study]"
	.venv-wheel/bin/regrow --help
	.venv-wheel/bin/python scripts/try_wheel.py --study
	rm -rf .venv-wheel

test-floor: .venv-floor/ready
	.venv-floor/bin/python scripts/fetch_fashion_mnist.py
	.venv-floor/bin/pytest --numprocesses auto --dist loadfile

.venv-floor/ready: pyproject.toml constraints-floor.txt
	$(PYTHON) -m venv .venv-floor
	.venv-floor/bin/pip install --quiet --disable-pip-version-check -c constraints-floor.txt -e '.[dev]'
	.venv-floor/bin/pip install --quiet --disable-pip-version-check -c constraints-floor.txt --no-deps $(ULTRALYTICS)
	touch $@

clean:
	rm -rf .venv .venv-wheel .venv-floor dist runs site .mypy_cache .ruff_cache .pytest_cache
