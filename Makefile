# make demo: FaceMAE on drawn faces from start to table. make test: the test suite.
# make bench: the speed of every stage at the toy's shapes.
PYTHON ?= python3
# The oldest and a broken interpreter are told apart from a wrong package early and in a sentence
VERSION_CHECK = import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed')

demo: .venv/ready
	PYTHON=.venv/bin/python ./reproduce.sh configs/toy.yaml

test: .venv/tests
	.venv/bin/python -m pytest -q

bench: .venv/ready
	.venv/bin/python tools/bench.py

.venv/ready: requirements.txt
	$(PYTHON) -c "$(VERSION_CHECK)"
	@echo 'installing about 6 GB into .venv; this takes some minutes'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet -r requirements.txt 'matplotlib>=3.8'
	touch $@

.venv/tests: .venv/ready requirements-dev.txt requirements-optional.txt
	.venv/bin/pip install --quiet -r requirements-dev.txt
	touch $@

.PHONY: demo test bench
