# Every target sets the checkout up first; that takes no time when there is nothing to do.
SHELL := /bin/sh
MAKEFLAGS += --no-print-directory
PYTHON := .venv/bin/python

export SQL
.PHONY: help setup up down status logs demo nightly replay sql new-job bench bench-latency bench-streams bench-capacity bench-soak \
  test test-long test-integration lint clean
.DEFAULT_GOAL := help

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' Makefile

setup:  ## Install what is needed into .venv (again in no time); STORE=s3: an S3 server, too; WITH=hdfs: an HDFS for tests
	@command -v python3 >/dev/null || { echo "python3 is missing: install Python 3.11 or newer" >&2; exit 1; }
	@python3 tools/setup.py $(or $(WITH),$(filter s3,$(STORE)))

# In containers where a Docker engine answers, else natively: MODE=docker|native decides. CLUSTER=1: Spark standalone.
# CRITICAL=1: critical events too. STORE: where lake, state and reports lie: s3 (a server of the stack's own), a URL, home.
export MODE CLUSTER CRITICAL FLUSH STORE
# Lines are seen when they are written, in a pipe too.
export PYTHONUNBUFFERED := 1

up: setup  ## Start the stack: MQTT broker, Kafka, bridge, streaming jobs; MODE=docker|native, CLUSTER=1, CRITICAL=1, STORE=s3
	@$(PYTHON) -m stack up

down: setup  ## Stop the stack; its data stay. FLUSH=1: first take all, close open windows
	@$(PYTHON) -m stack down

status: setup  ## Show what runs
	@$(PYTHON) -m stack status

logs: setup  ## Follow the logs of the stack
	@$(PYTHON) -m stack logs --follow

demo: setup  ## The whole chain, once, checked: METERS=1000 SPEED=720, or LOG=file FORMAT=dsmr|p1mon|sparkfun
	@$(PYTHON) -m stack.demo $(if $(LOG),--log "$(LOG)" $(if $(FORMAT),--format "$(FORMAT)")) \
	  $(if $(METERS),--meters "$(METERS)") $(if $(SPEED),--speed "$(SPEED)") \
	  $(if $(MODE),--mode "$(MODE)") $(if $(filter-out 0 false,$(CLUSTER)),--cluster) \
	  $(if $(STORE),--store "$(STORE)")

nightly: setup  ## The night's reports of a day: DATE=2026-01-31, or of several: FROM=2026-01-01 TO=2026-01-31
	@$(if $(DATE)$(FROM),,echo "Which day? make nightly DATE=2026-01-31, or FROM=2026-01-01 TO=2026-01-31" >&2; exit 2)
	@$(PYTHON) -m stack once nightly $(if $(DATE),--date "$(DATE)") $(if $(FROM),--from "$(FROM)") $(if $(TO),--to "$(TO)")

replay: setup  ## Replay: ARGS="run --tape … --meters 1000", ARGS=--help
	@$(PYTHON) -m stack once replay $(if $(ARGS),$(ARGS),--help)

sql: setup  ## Ask the lake: SQL="SELECT … FROM alarms", tables and reports by name
	@$(PYTHON) -m stack sql $(if $(SQL),"$$SQL",--help)

new-job: setup  ## A new job with its columns and a scenario: KIND=streaming|batch NAME=high_load
	@$(if $(and $(KIND),$(NAME)),,echo "Which? make new-job KIND=streaming NAME=high_load, or KIND=batch" >&2; exit 2)
	@$(PYTHON) tools/new_job.py "$(KIND)" "$(NAME)"

bench: setup  ## What the replay's sending costs, beside Kafka's own bench and others: ARGS=--help
	@$(PYTHON) -m bench.replay $(ARGS)

bench-latency: setup  ## How soon a critical event is told, beside micro-batches: ARGS=--help
	@mkdir -p data/tmp
	@$(PYTHON) -m bench.latency $(ARGS)

bench-streams: setup  ## Streaming jobs beside Kafka Streams, Flink and others, results checked: ARGS=--help
	@$(PYTHON) -m bench.streams $(ARGS)

bench-capacity: setup  ## Cores at a steady rate, the greatest rate, CPU per reading by process: ARGS=--help
	@$(PYTHON) -m bench.capacity $(ARGS)

bench-soak: setup  ## Two hours of readings at half of what the jobs can take: does anything grow? ARGS=--help
	@$(PYTHON) -m bench.soak $(ARGS)

# Two processes: on two cores half the time, and on one no loss.
PYTEST = mkdir -p data/tmp && TMPDIR="$(CURDIR)/data/tmp" \
  $(if $(METER_LOGS),METER_LOGS="$(abspath $(METER_LOGS))") $(PYTHON) -m pytest -n 2 --no-loadscope-reorder

test: WITH := s3
test: setup  ## All tests that take seconds; METER_LOGS= names a folder of real logs
	@$(PYTEST) $(ARGS)

test-long: WITH := s3 hdfs
test-long: setup  ## Those that take minutes by their nature: kills, an hour of faults, starved processes
	@$(PYTEST) -m long $(ARGS)

test-integration: setup  ## The same suites in containers; needs a Docker engine. ARGS="-k brokers"
	@mkdir -p data/tmp
	@TMPDIR="$(CURDIR)/data/tmp" $(PYTHON) -m pytest tests/integration -m "" $(ARGS)

lint: setup  ## Style, format, types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

clean: setup  ## Stop the stack and remove its data (asks first)
	@$(PYTHON) -m stack clean
