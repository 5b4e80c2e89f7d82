# Each target makes its own .venv and installs what it needs; later calls find it there.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint docs bench performance gpu asan clean

demo: .venv/demo
	$(BIN)/imbdiff demo

# Two processes of one thread each; see tests/conftest.py.
test: .venv/test
	$(BIN)/pytest -n 2 --dist loadgroup

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# With the machine's own python, where torch sees a GPU; see bench/gpu.py.
gpu:
	$(PYTHON) bench/gpu.py

# The operations' tests on a CPU library that checks every access and every undefined operation, in a copy of the package.
# libstdc++ is preloaded too, or the sanitizer does not find what it wraps and ends the process at the first exception.
ASAN := -g -fsanitize=address,undefined -fno-sanitize-recover=undefined
asan: .venv/test
	mkdir -p build/asan
	CXX='$(CXX) $(ASAN)' IMBDIFF_BUILD=cpu $(BIN)/python setup.py -q build --build-base build/asan --build-lib build/asan/lib
	cd build/asan && PYTHONPATH=$(CURDIR)/build/asan/lib ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  $(CURDIR)/$(BIN)/python -m pytest -p no:cacheprovider -n 2 --dist loadgroup $(CURDIR)/tests/ops

# docs/ops.md, from the docstrings.
docs: .venv/dev
	$(BIN)/python docs/make_ops.py

# On an otherwise idle machine. The allocator keeps what is freed, so that rivals are not compared by their page faults.
# One of them: make bench BENCH=bench/bench_product.py
BENCH = bench
bench: .venv/bench
	MALLOC_MMAP_THRESHOLD_=2000000000 MALLOC_TRIM_THRESHOLD_=4000000000 $(BIN)/pytest $(BENCH) --record
	$(MAKE) performance

# The tables and charts of docs/performance.md, from the records under bench/results.
performance: .venv/test
	$(BIN)/python -m bench.report

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch comes first and pinned, so that nothing that follows chooses another build of it.
.venv/constraints.txt: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo 'installing torch and imbdiff into .venv: a minute or two'
	grep -v '^triton' constraints.txt > $@
	$(BIN)/python -m pip install --disable-pip-version-check -q -c $@ torch numpy 'setuptools>=77' ninja
	$(BIN)/python -c 'import triton' 2>/dev/null || cp constraints.txt $@

# Without build isolation, so that the compiled operations are built against the torch that is there.
.venv/%: .venv/constraints.txt pyproject.toml setup.py imbdiff/ops/_schema.py $(wildcard csrc/*/*)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c $< --no-build-isolation -e '.[$*]'
	touch $@
