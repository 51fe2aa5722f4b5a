# What a person or CI asks of this tree. `make help` lists it.
#
# PROFILE=release builds with link-time optimisation: minutes slower to build, wanted for measuring and for installing.

PROFILE ?= dev
SCRIPT ?=
DEMO_ARGS ?=
PREFIX ?= /usr/local
CARGO ?= cargo
SECONDS ?= 60
SEED ?=
HOURS ?=
MUTANT ?=

TARGET_DIR = $(if $(filter release,$(PROFILE)),target/release,target/debug)
PGHERD = $(TARGET_DIR)/pgherd

.PHONY: help setup setup-tests build demo demo-down test check sim mutants chaos fmt schemas bench install clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## install what building and the demo need (apt), never touching a running PostgreSQL
	@deploy/setup

setup-tests: ## the same, and PostgreSQL 17 and etcd 3.5 under target/tools for the tests
	@deploy/setup --tests

build: setup ## build pgherd and pgherd-guard
	$(CARGO) build --bins --locked --profile $(PROFILE)

demo: build ## a three-member cluster on loopback until Ctrl-C; SCRIPT=failover is the drill without a person
	$(PGHERD) demo $(if $(SCRIPT),--script $(SCRIPT)) $(DEMO_ARGS)

demo-down: build ## end what a crashed demo left behind
	$(PGHERD) demo --down $(DEMO_ARGS)

test: setup-tests ## every test: unit, properties, simulation, live cluster
	@deploy/run-tests

check: setup ## formatting, lints, the rules of this tree, licences, schemas
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets -- -D warnings
	$(CARGO) test --locked --quiet --test tidy --test documents
	@if command -v cargo-audit >/dev/null; then $(CARGO) audit; else echo "cargo-audit is not installed: advisories were not checked"; fi

sim: setup ## storms from seeds against the core, on all cores for SECONDS=60; SEED=n replays one with its trace, HOURS=1 is a night
	$(CARGO) test --locked --quiet --profile sim --test simulation -- storm \
	  $(if $(SEED),--seed $(SEED),$(if $(HOURS),--seconds $$(($(HOURS) * 3600)) --night,--seconds $(SECONDS)))

mutants: setup ## every deliberate bug has to be caught by the simulator; MUTANT=name hunts one
	$(CARGO) test --locked --quiet --profile sim --features mutants --test simulation -- mutants $(if $(MUTANT),--only $(MUTANT))

chaos: setup-tests ## kill, freeze and cut off a live cluster for MINUTES=2 while commits wait for standbys, from SEED=1: nothing acknowledged is lost
	PGHERD_CHAOS_SECONDS=$$(($(or $(MINUTES),2) * 60)) PGHERD_CHAOS_SEED=$(or $(SEED),1) $(CARGO) test --locked --test live -- chaos --nocapture --test-threads=1

fmt: ## format the source
	$(CARGO) fmt

schemas: build ## write schemas/ anew from the types
	$(PGHERD) schema cluster > schemas/cluster.schema.json
	$(PGHERD) schema node > schemas/node.schema.json

bench: ## measure outages, switchovers beside the same by hand, rewinds, idle cost and the cost of quorum into docs/BENCHMARKS.md, about 25 minutes; DEMO_ARGS="--runs 3 --only stop" only shows
	$(MAKE) build PROFILE=release
	target/release/pgherd demo --script bench $(or $(DEMO_ARGS),--markdown docs/BENCHMARKS.md)

install: ## install binaries and the systemd unit below PREFIX
	$(MAKE) build PROFILE=release
	install -D -m 0755 target/release/pgherd $(DESTDIR)$(PREFIX)/bin/pgherd
	install -D -m 0755 target/release/pgherd-guard $(DESTDIR)$(PREFIX)/bin/pgherd-guard
	install -D -m 0644 deploy/pgherd.service $(DESTDIR)/etc/systemd/system/pgherd.service

clean: ## remove what was built
	$(CARGO) clean
