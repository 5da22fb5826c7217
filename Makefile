# make demo and make test each do all they need on a fresh machine with Python 3.11 or newer and a package registry.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test stress browser lint types install clean bench-cost bench-latency bench-compare bench-few bench-known bench-thresholds bench-robustness bench-surfaces

# Everything but the package itself: changes with pyproject.toml only.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip build
	$(BIN)/pip install --quiet ".[lite0,openvino]" --group dev
	touch $@

# The built wheel, so that what is tested and shown is what users install.
install: $(VENV)/installed
	rm -rf dist
	$(BIN)/python -m build --quiet --wheel
	$(BIN)/pip install --quiet --force-reinstall --no-deps dist/*.whl

demo: install
	$(BIN)/python -P examples/quickstart.py

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/mypy anomalib_cse

# Two processes of one thread each: with more, they would wait for one another. A process that dies, or sits at one test
# for four minutes, ends as that test's failure: one that is put in its place may wait for ever (pytest-xdist issue 784).
test: install lint types
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile --max-worker-restart 0 \
		-o faulthandler_timeout=240 -o faulthandler_exit_on_timeout=true tests

# some minutes; CSE_STRESS=0.1 for a tenth of it
stress: install
	$(BIN)/pytest -s tests/stress

# the report's page in Chromium, which must be there with its driver: apt-get install chromium chromium-driver
browser: install
	$(BIN)/pytest tests/browser

# exported models beside anomalib's and bare backbones; first with ARGS="--export-only" if the machine is busy, then when it is not
bench-latency: install
	$(BIN)/python benchmarks/latency.py $(ARGS)

# ARGS="compression --model CseGaussian --checkpoint model.ckpt --root ROOT --category NAME" or "training";
# what each takes, ARGS="training --help" says
bench-cost: install
	$(BIN)/python benchmarks/cost.py $(ARGS)

# DATA=ROOT ARGS="--categories NAME ...": the models of configs/compare/offline.yaml, or of another list with "--config LIST"
bench-compare: install
	$(BIN)/python benchmarks/compare.py --root $(DATA) $(ARGS)

# DATA=ROOT ARGS="--categories grid ... --models CseGaussian Padim": with 1 to 32 training images, five draws of each
bench-few: install
	$(BIN)/python benchmarks/few.py --root $(DATA) $(ARGS)

# DATA=ROOT ARGS="--categories NAME ...": what 1 to 10 known defects do for the detection of others; --kinds of other kinds
bench-known: install
	$(BIN)/python benchmarks/known.py --root $(DATA) $(ARGS)

# DATA=ROOT ARGS="--categories grid ...": good images that are rejected, expected and counted
bench-thresholds: install
	$(BIN)/python benchmarks/thresholds.py --root $(DATA) $(ARGS)

# DATA=ROOT ARGS="--categories NAME ...": images as another day, lamp, lens or camera gives them
bench-robustness: install
	$(BIN)/python benchmarks/robustness.py --root $(DATA) $(ARGS)

# ARGS="--output ROOT": SurfaceDemo's sets for bench-compare; with "--photographs DTD" others like them and parts too
bench-surfaces: install
	$(BIN)/python benchmarks/surfaces.py $(ARGS)

clean:
	rm -rf $(VENV) dist openvino_cache
