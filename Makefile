# Each target makes its own virtual environment. PYTHON: which Python to make it from. Options of pytest: $(VENV)/ready-to-test
	$(BIN)/python -m pytest tests $(T)

lint: $(VENV)/ready-to-test
	$(BIN)/ruff check --line-length 120 --select E,F,I,UP,B,W .
	$(BIN)/ruff format --line-length 120 --check .

# MinkowskiEngine 0.5.4 for `--sparse_backend minkowski` and its tests: Python 3.11 at most, and libopenblas-dev.
minkowski: $(VENV)/ready
	$(BIN)/pip install --quiet setuptools wheel ninja
	PATH="$(abspath $(BIN)):$$PATH" SETUPTOOLS_USE_DISTUTILS=stdlib MAX_JOBS=2 \
	    $(BIN)/pip install --no-build-isolation --no-deps MinkowskiEngine==0.5.4
