# `make` shows what there is. Everything here also runs in .ci/run.

SHELL       := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS   += --no-print-directory

BIN     := $(CURDIR)/.bin
MODULES := core gen client services tools
# There is no module at the root, so the linters get every module by name.
PACKAGES := $(MODULES:%=./%/...)

# A checkout that belongs to another user makes `go build` of a main package fail
# while it asks git for the version. What the user has set with `go env -w` is kept:
# a variable in the environment would otherwise hide it.
export GOFLAGS := $(strip $(filter-out -buildvcs=%,$(shell go env GOFLAGS)) -buildvcs=false)

# Nothing here needs cgo but the race detector; one setting for all the rest means
# that a dependency is compiled once and not once per target.
export CGO_ENABLED := 0

.PHONY: help
help: ## Show this help.
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  %-18s %s\n", $$1, $$2}' Makefile

.PHONY: run
run: ## Run everything in one process on http://127.0.0.1:8080.
	go run ./services/cmd/topgun

.PHONY: tools
tools: ## Install the build tools into .bin, when tools/build changed.
	@want=$$(cat tools/build/go.mod tools/build/go.sum | sha256sum); \
	if [ "$$(cat $(BIN)/.stamp 2>/dev/null)" != "$$want" ]; then \
		echo "installing the build tools (3 to 8 minutes the first time)"; \
		mkdir -p $(BIN); \
		GOWORK=off GOBIN=$(BIN) go -C tools/build install tool; \
		echo "$$want" > $(BIN)/.stamp; \
	fi

.PHONY: generate
generate: tools ## Generate gen/go from api.
	$(BIN)/buf generate

.PHONY: build
build: ## Build everything: as a workspace, module by module, and the binaries into .bin/release.
	go build work
	@for m in $(MODULES); do echo "GOWORK=off go -C $$m build ./..."; GOWORK=off go -C $$m build ./...; done
	go build -ldflags='-s -w' -o $(BIN)/release/ ./services/cmd/...

.PHONY: test
test: tools postgres ## Run all tests with the race detector, none skipped, none from the cache.
	@mkdir -p $(BIN)
	CGO_ENABLED=1 $(BIN)/gotestsum --format pkgname --jsonfile $(BIN)/test.json -- -race -count=1 -shuffle=on -timeout 20m work
	@if grep '"Action":"skip"' $(BIN)/test.json | grep '"Test":'; then \
		echo "the tests above were skipped: a test runs, or it is not there" >&2; exit 1; \
	fi

# The tests start a Postgres of their own from its binaries. Where there are none,
# this installs Debian's package, so that no test is skipped for the lack of it.
.PHONY: postgres
postgres:
	@found() { \
		[ -n "$${TOPGUN_TEST_POSTGRES_URL:-}" ] || [ -x "$${PG_BIN:-/nowhere}/initdb" ] || \
		compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null || command -v initdb >/dev/null; \
	}; \
	if found; then exit 0; fi; \
	if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
		echo "The tests need Postgres. Install it (Debian: sudo apt-get install postgresql)," >&2; \
		echo "or set PG_BIN to a folder with initdb, or TOPGUN_TEST_POSTGRES_URL to a server." >&2; \
		exit 1; \
	fi; \
	echo "installing postgresql"; \
	export DEBIAN_FRONTEND=noninteractive; \
	apt-get update -qq && apt-get install -y -qq --no-install-recommends postgresql >/dev/null; \
	found || { echo "postgresql is installed, but there is no initdb in /usr/lib/postgresql/*/bin" >&2; exit 1; }

.PHONY: lint
lint: tools ## Lint and check the format of protobuf and Go.
	$(BIN)/buf lint api
	$(BIN)/buf format -d --exit-code api
	$(BIN)/golangci-lint run $(PACKAGES)
	@bad=$$($(BIN)/gofumpt -l $(MODULES)); \
	if [ -n "$$bad" ]; then printf 'not formatted (make format):\n%s\n' "$$bad" >&2; exit 1; fi

.PHONY: format
format: tools ## Format protobuf and Go.
	$(BIN)/buf format -w api
	$(BIN)/gofumpt -w $(MODULES)

.PHONY: check-generated
check-generated: tools ## Fail when gen is not what api generates.
	@out=$$(mktemp -d); trap 'rm -rf "$$out"' EXIT; \
	$(BIN)/buf generate -o "$$out"; \
	diff -r gen/go "$$out/gen/go" || { echo "gen differs from what api generates: run make generate" >&2; exit 1; }

# The base is taken out of git by `git archive`: that works in a shallow clone and
# with any owner of the folder, where buf's own clone of .git does not.
.PHONY: check-breaking
check-breaking: tools ## Fail when api breaks what main, or the last commit, promises.
	@has() { git cat-file -e "$$1:api/buf.yaml" 2>/dev/null; }; \
	head=$$(git rev-parse -q --verify HEAD || true); base=; \
	for ref in refs/remotes/origin/main refs/heads/main; do \
		if has $$ref && [ "$$(git rev-parse $$ref)" != "$$head" ]; then base=$$ref; break; fi; \
	done; \
	if [ -z "$$base" ] && has HEAD && [ -n "$$(git status --porcelain -- api)" ]; then base=HEAD; fi; \
	if [ -z "$$base" ] && has HEAD~1; then base=HEAD~1; fi; \
	if [ -z "$$base" ]; then echo "api has no earlier version here: nothing to compare"; exit 0; fi; \
	echo "comparing api with $$base ($$(git rev-parse --short $$base))"; \
	old=$$(mktemp -d); trap 'rm -rf "$$old"' EXIT; \
	git archive $$base api | tar -x -C "$$old"; \
	$(BIN)/buf breaking api --against "$$old/api"

.PHONY: check-deps
check-deps: ## Fail when a package imports what the house rules forbid.
	go run ./tools/depcheck

.PHONY: check-invariants
check-invariants: ## Fail when INVARIANTS.md names a test that is not there.
	go run ./tools/invariants

.PHONY: vuln
vuln: tools ## Look for known vulnerabilities; says so when it could not.
	@for m in $(MODULES); do \
		status=0; out=$$($(BIN)/govulncheck -C $$m ./... 2>&1) || status=$$?; \
		printf '%s: %s\n' "$$m" "$$out"; \
		if [ $$status -eq 0 ]; then continue; fi; \
		if [ $$status -ne 3 ] && grep -qE 'fetching vulnerabilities|vuln\.go\.dev' <<<"$$out"; then \
			echo "WARNING: the vulnerability check DID NOT RUN: its database cannot be reached."; exit 0; \
		fi; \
		exit $$status; \
	done

.PHONY: bench
bench: ## Measure a server built from this tree, about two minutes.
	go run ./tools/bench

.PHONY: clean
clean: ## Remove built binaries and reports, not the tools.
	rm -rf $(BIN)/release $(BIN)/test.json
