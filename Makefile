# Each target creates .venv and installs what it needs by itself.
PYTHON ?= python3
PIP = .venv/bin/pip --disable-pip-version-check -q
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test check contract clean

demo: .venv/installed
	.venv/bin/twinweave demo

test: check
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile

check: .venv/installed-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# Every architecture and every PEFT type; resumes where it was stopped. NAMES="llama gpt2" runs those alone.
contract: .venv/installed-test
	OMP_NUM_THREADS=1 PYTHONPATH=tests .venv/bin/python -m contract $(NAMES)

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis runs

.venv/bin/python:
	$(PYTHON) -m venv .venv

# torch first: with a pinned torch in place nothing else pulls another build of it.
.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e .
	touch $@

.venv/installed-test: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e '.[test]'
	touch .venv/installed $@
