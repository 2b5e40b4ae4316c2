# `make app` and `make test` do everything on a fresh machine with python3 (3.11 or newer), pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: app test check clean

app: $(VENV)/app.stamp
	$(BIN)/perfmodel app

test: $(VENV)/test.stamp check
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

check: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "perfmodel needs Python 3.11 or newer, this is %d.%d; set PYTHON=..." % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)

$(VENV)/app.stamp: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) -e '.[app]'
	touch $@

$(VENV)/test.stamp: $(VENV)/app.stamp
	$(PIP) -e '.[app,collect,dev]'
	touch $@

clean:
	rm -rf $(VENV) dist build
