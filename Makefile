# make demo    train a small language model with five losses, each beside its eager reference (about 3 minutes on 2 cores)
# make test    the test suite
# make bugs    every seeded bug of the kernels, of which `make test` takes a twentieth
# make bench   measure every loss on every backend, and put the tables into the pages; on a GPU its tests come before
# make lint    formatters, linters and the type checker
# make site    the documentation as a site, in build/site; a link or an anchor that leads nowhere fails
#
# Each creates .venv, installs what constraints.txt pins and builds the extensions first, where that has not happened yet.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/*.h csrc/*.cpp csrc/*/*)

.PHONY: demo test bugs bench lint site install clean

demo: install
	$(RUN) examples/demo.py

test: $(VENV)/oracles
	$(RUN) -m pytest -n 2 --dist loadgroup

bugs: $(VENV)/oracles
	$(RUN) -m pytest -n 2 --dist loadgroup --all-bugs -k "bug_is_caught"

bench: install
	$(RUN) bench/session.py

lint: install
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(RUN) tools/write_losses.py --check
	$(VENV)/bin/mypy
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(VENV)/bin/pyright --warnings --pythonpath $(RUN)
	$(VENV)/bin/clang-format --dry-run --Werror $(wildcard csrc/*.h csrc/*.cpp csrc/*/*)
	$(RUN) bench/report.py --check

site: install
	$(VENV)/bin/mkdocs build --strict

install: $(VENV)/installed

$(VENV)/installed: $(SOURCES)
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --disable-pip-version-check --constraint constraints.txt --editable ".[test,demo,lint,docs]"
	touch $@

# Other frameworks' files, which tests compare with: without what they depend on, which the tests do not need.
$(VENV)/oracles: $(VENV)/installed tests/oracles.txt
	$(RUN) -m pip install --disable-pip-version-check --no-deps --ignore-requires-python --requirement tests/oracles.txt
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info fused_losses/*.so
