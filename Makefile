# `make help` lists the verbs. Each sets up what it needs first; a second run reuses it.
.DEFAULT_GOAL := help
.PHONY: help setup lock demo sweep retry test lab app report browser bench profile compare siblings evidence lint format clean clean-cache

# The active conda or virtual environment, else .venv here. conda's base is left alone.
ACTIVE := $(or $(VIRTUAL_ENV),$(if $(filter-out base,$(CONDA_DEFAULT_ENV)),$(CONDA_PREFIX)))
ENV := $(or $(ACTIVE),.venv)
PY := $(ENV)/bin/python
# The first interpreter that is new enough; bootstrap.py's own check explains where there is none.
PYTHON ?= $(or $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done),python3)

# With glibc's defaults a training step on the CPU spends much of its time on page faults: freed
# buffers go back to the system and are zeroed again. These keep them. Other systems ignore them.
ALLOCATOR := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=67108864

# A photograph travels to the kernel as one message. Beyond 10 MiB, tornado's default, the server would
# drop the connection without a word.
UPLOADS := tornado_settings="{'websocket_max_message_size': 268435456}"

help:  ## List the verbs
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 13

setup:  ## Make the environment (.venv, or the active one) and install everything [LOCK=requirements.lock]
	@$(PYTHON) bootstrap.py $(ENV) $(LOCK)

# Of this environment. Which build of torch (CUDA or not) and its libraries are left to the machine.
lock: setup  ## Write the exact versions of this environment into requirements.lock
	@$(PY) -m pip freeze --exclude-editable | grep == | sed -E 's/\+.*//; /^(nvidia|cuda|triton)/d' > requirements.lock

demo: setup  ## From nothing to results: VAE, SimCLR x 3, evaluation, sensitivity (about 7 minutes)
	@$(ALLOCATOR) $(PY) -m idaa_lib.sweeps demo

# FLAGS: --jobs 2, --scheduler tcp://host:8786 (docs/cluster.md).
sweep: setup  ## Make the runs of GRID=grid.yaml; FLAGS=--dry-run says what they are and take
	@$(ALLOCATOR) $(PY) -m idaa_lib.sweeps $(FLAGS) $(or $(GRID),$(error Say which: make sweep GRID=grid.yaml))

retry: override FLAGS += --retry
retry: sweep  ## Make those runs of GRID=grid.yaml again that failed

test: setup  ## Lint, types and all tests (or those of TESTS="tests/test_nets.py …")
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy
	@$(PY) -m pytest -n auto --dist worksteal $(TESTS)

# notebooks/labconfig turns off its news, and leaves all other settings of the user's and the site's.
lab: setup  ## Open JupyterLab on this machine only, at notebook 00 (its address has the token)
	@$(ALLOCATOR) JUPYTER_CONFIG_PATH="$(CURDIR)/notebooks$${JUPYTER_CONFIG_PATH:+:$$JUPYTER_CONFIG_PATH}" \
		$(ENV)/bin/jupyter lab --ip=127.0.0.1 \
		--LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb --ServerApp.$(UPLOADS) \
		$(if $(filter 0,$(shell id -u)),--allow-root)

report: setup  ## Write outputs/report.html: results, curves and pictures on one page
	@JUPYTER_PREFER_ENV_PATH=1 $(ENV)/bin/jupyter nbconvert --execute --to html --no-input \
		--template=report --TemplateExporter.extra_template_basedirs=notebooks/templates \
		--output-dir="$$($(PY) -c 'import os; print(os.path.expanduser(os.environ.get("IDAA_OUTPUTS") or "outputs"))')" \
		--output=report notebooks/13_report.ipynb

# Loopback alone, a token that is new at each start, no code, no request that leaves this machine.
app: setup  ## Serve the explorer and the runs as web pages without code (its address has the token)
	@$(ALLOCATOR) JUPYTER_PREFER_ENV_PATH=1 JUPYTER_PATH=$(CURDIR)/notebooks/app \
		$(ENV)/bin/voila notebooks/app --template=idaa --classic_tree=True --strip_sources=True \
		--VoilaConfiguration.allow_template_override=NO --token \
		--Voila.ip=127.0.0.1 --Voila.$(UPLOADS) --no-browser --MappingKernelManager.cull_idle_timeout=600

browser:  ## Install Chromium for the browser tests (Debian, Ubuntu)
	@for name in "$$IDAA_CHROMIUM" chromium chromium-browser; do \
		command -v "$$name" > /dev/null && exit 0; done; \
		root=$$([ "$$(id -u)" = 0 ] || echo sudo); \
		$$root apt-get update -q && \
		$$root apt-get install -qy --no-install-recommends chromium fonts-dejavu-core

bench: setup  ## Speed of ours against the straightforward formulation (about 25 quiet minutes)
	@$(PY) benchmarks/speed.py

profile: setup  ## Where the time of an IDAA step goes: a page and a trace in outputs/profile
	@$(ALLOCATOR) $(PY) benchmarks/profile_step.py

compare: setup  ## The paper's main table on a subset of CIFAR-10: every method and adversary (about 90 minutes)
	@$(ALLOCATOR) $(PY) benchmarks/methods.py

siblings: setup  ## CASSLE, AugSelf, IP-IRM and RSA, with and without IDAA, on a subset of CIFAR-10
	@$(ALLOCATOR) $(PY) benchmarks/siblings.py

evidence: setup  ## Do the paper's claims hold on CIFAR-10? About 12 hours; stopped, the same command goes on
	@$(ALLOCATOR) $(PY) benchmarks/evidence.py

lint: setup  ## Lint and types alone
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy

format: setup  ## Format the code and strip the notebooks of output
	@$(PY) -m ruff format . && $(PY) -m ruff check --fix . && $(PY) -m nbstripout --keep-id notebooks/*.ipynb

clean:  ## Remove .venv and caches of tools (never data/ or outputs/)
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache *.egg-info

clean-cache: setup  ## Remove decoded images that no data set has any more (all of them: WHAT=all), with sizes
	@$(PY) -m idaa_lib.data clean $(WHAT)
