# make quickstart   an environment, a small dataset, four models, a comparison
# make test         the environment and the tests, all but the slow ones
# make test-all     the slow ones as well: kills, restarts, many processes;
#                   installs lm-eval, which some of them need
# make soak         20 kills of a run of two processes
# make check        lint
# make clean        remove the environment; runs and datasets stay
#
# PYTHON=python3.12       another interpreter for the environment
# TORCH_INDEX=URL         where to take torch from, e.g. the index of CPU
#                         wheels, https://download.pytorch.org/whl/cpu

PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.installed
READY_EVAL := $(VENV)/.installed-eval

# a d_ff for each preset that makes all four equally large
QUICK_RUNS := gpt2:588 llama2:416 llama3:512 qwen3:480

.PHONY: quickstart test test-all soak check clean

$(READY): requirements.txt
	@$(PYTHON) -c "import ensurepip, venv" 2>/dev/null || { \
	  echo "error: $(PYTHON) cannot make virtual environments. Install them"; \
	  echo "(Debian and Ubuntu: sudo apt install python3-venv), or name"; \
	  echo "another interpreter: make PYTHON=/path/to/python3 ..."; exit 1; }
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { \
	  echo "error: $(PYTHON) is older than Python 3.11: name another one"; \
	  echo "with make PYTHON=/path/to/python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
ifneq ($(TORCH_INDEX),)
	$(RUN) -m pip install --quiet --index-url $(TORCH_INDEX) \
	  $$(grep '^torch==' requirements.txt)
endif
	$(RUN) -m pip install --quiet -r requirements.txt
	@touch $@

$(READY_EVAL): requirements-eval.txt $(READY)
	$(RUN) -m pip install --quiet -r requirements-eval.txt
	@touch $@

data/python_stdlib/meta.json: | $(READY)
	$(RUN) data/python_stdlib/prepare.py

quickstart: $(READY) data/python_stdlib/meta.json
	@set -e; for run in $(QUICK_RUNS); do \
	  echo "== $${run%%:*}"; \
	  $(RUN) train.py config/quickstart.py \
	    --arch_preset=$${run%%:*} --d_ff=$${run##*:}; \
	done
	@echo "== comparison"
	$(RUN) compare_architectures.py --latest 4 --plot comparison.png
	@echo "== samples from the best"
	$(RUN) sample.py --prompt="def " --stop_at_eot=False \
	  --out_dir=$$($(RUN) compare_architectures.py --latest 4 --print_best)

test: $(READY)
	$(RUN) -m pytest -q -m "not slow" tests

test-all: $(READY_EVAL)
	$(RUN) -m pytest -q tests

soak: $(READY)
	$(RUN) tests/soak.py --kills 20

check: $(READY)
	$(RUN) -m ruff check .

clean:
	rm -rf $(VENV)
