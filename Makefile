# Everything runs in a virtual environment of its own, .venv, with the versions of constraints.txt.
#
#   make train              trains the bundle; without a data set on a synthetic phantom
#   make train ARGS="--dataset_dir /data/ACDC --labeled_patients 7"
#   make zip                makes of the bundle the zip that the Model Zoo hosts; trains it first where it has no weights
#   make table              the published protocol on ACDC, 3 and 7 labeled patients, for GPUs; prints the tables:
#                           KNOWSAM_ACDC_DIR=/data/ACDC make table ARGS="--sam_checkpoint sam_vit_b_01ec64.pth"
#   make test               installs the test extras and runs the tests
#   make check              lint, every test, the slow ones included, and the examples in docstrings
#   make docs               builds docs/build/html; a warning is an error
#   make lint               black, isort and flake8, changing nothing
#   make clean              removes .venv and caches; trained models stay
#
# The interpreter is python3 or the newest python3.x of 3.10 to 3.14; PYTHON names one:  make train PYTHON=python3.12

PYTHON ?=
VENV   ?= .venv
BUNDLE ?= bundles/knowsam_acdc
ARGS   ?=

venv_python = $(VENV)/bin/python
pip_install = $(venv_python) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
sources     = $(wildcard knowsam_monai bundles tests examples benchmarks docs pretraining zoo)
pythons     = $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11 python3.10)
packaging   = setup.cfg pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help train zip table test check docs lint clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | sed '/^The interpreter/q'

train: $(VENV)/.installed
	@# MONAI warns that a config is code: this one is the repository's own
	$(venv_python) -W "ignore:parsing config_file" -m monai.bundle run --config_file $(BUNDLE)/configs/train.json $(ARGS)

zip: $(VENV)/.installed-zoo | $(BUNDLE)/models/model.pt
	$(venv_python) -m zoo $(BUNDLE) $(ARGS)

$(BUNDLE)/models/model.pt:
	@$(MAKE) --no-print-directory train BUNDLE=$(BUNDLE) ARGS=

table: $(VENV)/.installed
	$(venv_python) benchmarks/hosts.py --published $(ARGS)

test: $(VENV)/.installed-test
	@# tests wait for processes of their own and for files, so there are three workers for two cores
	OMP_NUM_THREADS=1 $(venv_python) -m pytest --numprocesses $$(($$(env -u OMP_NUM_THREADS nproc) * 3 / 2)) \
		--dist loadfile --no-loadscope-reorder $(ARGS)

check: lint $(VENV)/.installed-test
	$(venv_python) -m pytest -m "slow or not slow" $(ARGS)
	$(venv_python) -m pytest --doctest-modules knowsam_monai

docs: $(VENV)/.installed-docs
	$(venv_python) -m sphinx --fail-on-warning --keep-going --quiet docs/source docs/build/html
	@echo "docs/build/html/index.html"

lint: $(VENV)/.installed-dev
	$(venv_python) -m black --check --quiet --diff $(sources)
	$(venv_python) -m isort --check-only --diff $(sources)
	$(venv_python) -m flake8 $(sources)

clean:
	rm -rf $(VENV) build dist docs/build *.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment that is there and has pip is taken as it is; one whose making was interrupted is made anew.
$(VENV)/.created:
	@$(venv_python) -m pip --version >/dev/null 2>&1 || { \
	  for python in $(pythons); do \
	    $$python -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null || continue; \
	    $$python -c 'import ensurepip' 2>/dev/null || { \
	      version=$$($$python -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	      : $${needed:="\`$$python\` has no ensurepip; get it with \`sudo apt install python$$version-venv\`."}; continue; }; \
	    exec $$python -m venv --clear $(VENV); \
	  done; \
	  for python in $(pythons); do found="$$found $$python ($$($$python --version 2>/dev/null || echo not found)),"; done; \
	  : $${needed:="Python must be 3.10 to 3.14 but these were tried:$${found%,}; install one, or name it as in \
	\`make PYTHON=/opt/python3.12/bin/python $(firstword $(MAKECMDGOALS))\`."}; \
	  echo "$$needed" >&2; exit 1; }
	@touch $@

$(VENV)/.installed: $(VENV)/.created $(packaging)
	@echo "Installing into $(VENV): torch is large, this takes some minutes the first time."
	@$(pip_install) --editable .
	@touch $@

$(VENV)/.installed-zoo: $(VENV)/.installed
	@$(pip_install) --editable ".[zoo]"
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@$(pip_install) --editable ".[test]"
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	@$(pip_install) --editable ".[docs]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.created $(packaging)
	@$(pip_install) black build flake8 isort twine
	@touch $@
