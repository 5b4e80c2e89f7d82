# Each target makes its own .venv and installs what it needs; later calls find it there.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean

demo: .venv/demo
	$(BIN)/imbdiff demo

# Two processes of one thread each; see tests/conftest.py.
test: .venv/test
	$(BIN)/pytest -n 2 --dist loadgroup

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

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
