# mediatok on a bare machine: Python 3.11 or newer, make, and the package registries.

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PYTHON ?= python3

.DEFAULT_GOAL := help
.PHONY: help setup chromium studio demo test lint bench data clean

help:  ## say what each target does
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 10

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

setup: $(STAMP) chromium  ## make .venv with everything that the tests need

chromium:  # the browser of the studio's tests, where Debian's packages can be installed
	@command -v chromium >/dev/null || { \
		[ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null; } || \
		echo "chromium is missing: the studio's browser tests will be skipped"

studio: $(STAMP)  ## check the shipped models, then serve the studio on http://127.0.0.1:7860
	$(PY) -m mediatok.app.demo
	$(VENV)/bin/mediatok studio

demo: $(STAMP)  ## encode and decode the samples; reconstructions and .mtok files go to demo/
	$(PY) -m mediatok.app.demo --out demo

test: setup  ## run the tests
	$(PY) -m pytest tests

lint: $(STAMP)  ## ruff
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

bench: $(STAMP)  ## print speed and memory as ratios against the plain formulations
	$(PY) benchmarks/nearest.py
	$(PY) benchmarks/attention.py
	$(PY) benchmarks/titok.py
	$(PY) benchmarks/flextok.py
	$(PY) benchmarks/tokenflow.py
	$(PY) benchmarks/seed.py
	$(PY) benchmarks/maskgit.py
	$(PY) benchmarks/xar.py
	$(PY) benchmarks/simcodec.py
	$(PY) benchmarks/cif.py
	$(PY) benchmarks/paraformer.py
	$(PY) benchmarks/gense.py
	$(PY) benchmarks/vat.py

data: $(STAMP)  ## fetch two sets of emoji, EfficientNet-Lite0 features, festvox-ru, furniture and pybullet's shapes into data/
	$(PY) -m mediatok.training.fetch_emoji --out data/fluent-emoji --google data/emoji-google
	$(PY) -m mediatok.training.fetch_features --out data/efficientnet_lite0.safetensors
	$(PY) -m mediatok.training.fetch_festvox --out data/festvox-ru
	$(PY) -m mediatok.training.fetch_furniture --out data/furniture
	$(PY) -m mediatok.training.fetch_pybullet --out data/pybullet

clean:  ## remove what the other targets made
	rm -rf $(VENV) demo build *.egg-info
