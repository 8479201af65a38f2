# The same targets for a person, for the README and for .ci/run. Every one makes and reuses .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(wildcard pipeline/*.pyx pipeline/*.pxd pipeline/*/*.pyx pipeline/*/*.pxd pipeline/*/*.h)
ASAN_SITE := build/asan/site

# A network that fails for a moment fails no target. Heard by pip wherever it runs, also in tools/.
export PIP_RETRIES ?= 10
export PIP_RESUME_RETRIES ?= 10

.PHONY: build test test-all lint typecheck demo three-nodes bench bench-peers bench-cluster bench-growth bench-snapshot bench-check \
	bench-reference asan clean raftpb docs stubs help

help:
	@echo "make demo demo-all three-nodes test test-all chaos soak lint typecheck docs stubs bench bench-peers bench-cluster bench-growth bench-snapshot bench-check bench-reference asan tsan free-threaded fuzz fuzz-merge build raftpb clean"

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

# Editable, so that a change of a .py needs no build; a change of a .pyx or .pxd does.
$(VENV)/.built: $(VENV)/.created $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

# What pip builds with in an environment of its own: for the targets that call setup.py themselves.
$(VENV)/.builders: $(VENV)/.created pyproject.toml
	$(BIN)/python -c 'import tomllib; \
		print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' \
		> $(VENV)/builders.txt
	$(BIN)/python -m pip install --quiet --requirement $(VENV)/builders.txt
	touch $@

$(VENV)/.linters: $(VENV)/.created pyproject.toml
	$(BIN)/python -m pip install --quiet 'mypy>=1.15' 'ruff>=0.9' 'cython-lint>=0.16' types-protobuf 'grpcio-tools>=1.72'
	touch $@

# Sphinx and what it needs here; not in an editable install of the extra, which would build all anew.
$(VENV)/.writers: $(VENV)/.created pyproject.toml
	$(BIN)/python -c 'import tomllib; \
		print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' \
		> $(VENV)/writers.txt
	$(BIN)/python -m pip install --quiet --requirement $(VENV)/writers.txt
	touch $@

build: $(VENV)/.built

# make demo TLS=1: over mutual TLS.
demo: build
	$(BIN)/raft-pipeline demo $(if $(TLS),--tls)

three-nodes: build
	$(BIN)/python -m pipeline.examples.three_nodes

# Every etcd that can be had here: the demo, the three nodes and the interop tests beside it, and a
# table. make demo-all DEMO_ALL='--quick 3.4 3.7.3'
.PHONY: demo-all
demo-all: build
	$(BIN)/python tools/demo_all.py $(DEMO_ALL)

# Two sessions at a time: most tests wait longer than they work, and a busy machine breaks none.
# make test TEST_ARGS='-x -k name'
test: build
	$(MAKE) --no-print-directory -j2 $(TEST_SESSIONS) TEST_ARGS="-m 'not slow' $(TEST_ARGS)"

# The slow ones, too, and ten times as many examples of hypothesis.
test-all: build
	HYPOTHESIS_PROFILE=ci $(MAKE) --no-print-directory -j2 $(TEST_SESSIONS)

# The longest first.
TEST_SESSIONS := tests-others tests-fault tests-functional
.PHONY: $(TEST_SESSIONS)
tests-fault:
	$(BIN)/python -m pytest -q -o cache_dir=.pytest_cache/fault $(TEST_ARGS) tests/fault

tests-functional:
	$(BIN)/python -m pytest -q -o cache_dir=.pytest_cache/functional $(TEST_ARGS) tests/functional

tests-others:
	$(BIN)/python -m pytest -q -o cache_dir=.pytest_cache/others $(TEST_ARGS) --ignore=tests/functional \
		--ignore=tests/fault

# A real etcd and two members of ours, killed, stopped and cut off from one another for ten minutes.
# make chaos CHAOS='--duration 3600 --ours 1 --tls --etcd PATH'
.PHONY: chaos
chaos: build
	$(BIN)/python -m tests.chaos $(CHAOS)

# Everything a node does for two hours; whether memory, threads and descriptors stay as they were.
# make soak SOAK='--duration 900'
.PHONY: soak
soak: build
	$(BIN)/python -m tests.soak $(SOAK)

lint: build $(VENV)/.linters typecheck libssl-check
	$(BIN)/ruff check . build/howto
	$(BIN)/ruff format --check . build/howto
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/cython-lint pipeline tests

# Our prototypes of OpenSSL's functions against OpenSSL's own, where its headers are installed.
.PHONY: libssl-check
libssl-check:
	@if printf '#include <openssl/ssl.h>\n' | $(CC) -E -x c - > /dev/null 2>&1; then \
		$(CC) -std=gnu11 -Wall -Wextra -Wno-unused-function -Werror -DLIBSSL_CHECK -fsyntax-only -x c pipeline/tls/libssl.h; \
	else \
		echo 'libssl-check: SKIPPED: OpenSSL has no headers here. On Debian: apt-get install libssl-dev' >&2; \
	fi

typecheck: build $(VENV)/.linters
	$(BIN)/python -m mypy --strict
	$(BIN)/python -m mypy --strict tests/typing
	rm -rf build/howto && $(BIN)/python -m tests.support.pages build/howto
	$(BIN)/python -m mypy --strict build/howto
	MYPYPATH=tools $(BIN)/python -m mypy --strict tools/wheels.py tools/test_wheels.py tools/demo_all.py tools/free_threaded.py tools/stubs.py
	$(BIN)/python -m mypy.stubtest pipeline.tls._engine pipeline.net._budget pipeline.wire._chunks pipeline.wire._frames pipeline._core pipeline.wire._messages pipeline.receive._arrivals pipeline.receive._receiver pipeline.net._sockets pipeline.stream._streams

# The site, in build/docs: the pages of docs/, and the reference out of the docstrings. A warning is an
# error; so is a name that leads nowhere.
docs: build $(VENV)/.writers
	rm -rf build/docs
	$(BIN)/python -m sphinx -q -E -W --keep-going -d build/doctrees docs build/docs
	@echo build/docs/index.html

# The docstrings of compiled classes into their .pyi files, for editors; a test fails when they differ.
stubs: build
	$(BIN)/python tools/stubs.py

benchmarks/bin/%: benchmarks/c/%.c $(wildcard benchmarks/c/*.h)
	mkdir -p $(@D)
	$(CC) -O2 -std=gnu11 -Wall -Wextra -pthread -o $@ $<

# The same programs over OpenSSL, whose headers and library only the benchmarks compile against.
benchmarks/bin/%-tls: benchmarks/c/%.c $(wildcard benchmarks/c/*.h)
	mkdir -p $(@D)
	$(CC) -O2 -std=gnu11 -Wall -Wextra -pthread -DTLS -o $@ $< -lssl -lcrypto

bench: build benchmarks/bin/sink benchmarks/bin/bare_sender benchmarks/bin/handover
	$(BIN)/python benchmarks/report.py $(BENCH_ARGS)

bench-snapshot: build benchmarks/bin/handover
	$(BIN)/python benchmarks/bench_snapshot.py $(BENCH_ARGS)

benchmarks/bin/clientv3: $(wildcard benchmarks/peers/clientv3/*.go benchmarks/peers/clientv3/go.*)
	mkdir -p $(@D)
	cd benchmarks/peers/clientv3 && go build -o ../../bin/clientv3 .

benchmarks/bin/etcd: $(wildcard benchmarks/peers/etcd/*.go benchmarks/peers/etcd/go.*)
	mkdir -p $(@D)
	cd benchmarks/peers/etcd && go build -o ../../bin/etcd .

# A peer that cannot be installed is skipped by name, so neither of the two may fail.
$(VENV)/.peers: $(VENV)/.built
	$(BIN)/python -m pip install --quiet --editable '.[bench]' || echo 'not all peers are installed' >&2
	touch $@

TLS_PROGRAMS := benchmarks/bin/sink-tls benchmarks/bin/bare_sender-tls

# BENCH_ROUNDS=1 BENCH_SUBJECTS=etcd,ours BENCH_SIZES=128 make bench-peers; BENCH_ARGS='--sides tls'
bench-peers: $(VENV)/.peers benchmarks/bin/sink benchmarks/bin/bare_sender benchmarks/bin/handover
	$(MAKE) --no-print-directory benchmarks/bin/etcd || echo 'no etcd to compare with' >&2
	$(MAKE) --no-print-directory $(TLS_PROGRAMS) || echo 'no bare C over TLS to compare with' >&2
	$(BIN)/python benchmarks/compare.py --rounds $(or $(BENCH_ROUNDS),5) \
		--subjects '$(BENCH_SUBJECTS)' --sizes '$(BENCH_SIZES)' $(BENCH_ARGS)

# An etcd that leads, with us as its second member or another etcd, written to by etcd's own client. The
# etcd is built out of the Go module proxy; PIPELINE_ETCD=PATH takes another.
CLUSTER_ETCD := $(shell sed -n 's|^require go.etcd.io/etcd/server/v3 v||p' tools/etcds/3.6/go.mod)
bench-cluster: build benchmarks/bin/handover benchmarks/bin/clientv3
	test -n "$$PIPELINE_ETCD" || $(BIN)/python tools/demo_all.py --fetch $(CLUSTER_ETCD)
	PIPELINE_ETCD=$${PIPELINE_ETCD:-build/etcds/$(CLUSTER_ETCD)/etcd} $(BIN)/python benchmarks/cluster.py $(BENCH_ARGS)

# 1 to 128 peers, 1 to 64 workers, 64 B to 64 MiB.
bench-growth: build benchmarks/bin/sink benchmarks/bin/bare_sender benchmarks/bin/handover
	$(MAKE) --no-print-directory $(TLS_PROGRAMS) || echo 'no TLS to measure with' >&2
	$(BIN)/python benchmarks/growth.py $(BENCH_ARGS)

# Instructions per message against benchmarks/reference.json; the second makes this tree the reference.
bench-check bench-reference: build benchmarks/bin/sink benchmarks/bin/bare_sender
	$(MAKE) --no-print-directory $(TLS_PROGRAMS) || echo 'no OpenSSL to check with' >&2
	$(BIN)/python benchmarks/check.py $(if $(filter bench-reference,$@),--write)

# The protoc of protobuf 6.30, in a place of its own: what it writes runs on every runtime we allow
# (protobuf >= 6.31 in pyproject.toml), which is not so with a newer one.
raftpb:
	$(PYTHON) -m venv build/raftpb
	build/raftpb/bin/python -m pip install --quiet 'grpcio-tools==1.72.2'
	build/raftpb/bin/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. \
		pipeline/raftpb/raft.proto examples/etcd_log.proto

# Address and undefined-behaviour sanitizers, preloaded into CPython. The build is a copy of its
# own; -P keeps the tree's modules away. Leaks are the isolated tests' business: the interpreter
# itself does not free everything.
asan: build $(VENV)/.builders
	rm -rf build/asan
	PIPELINE_SANITIZE=address $(BIN)/python setup.py -q build --build-base build/asan --build-lib $(ASAN_SITE)
	$(MAKE) --no-print-directory -j2 asan-functional asan-others

ASAN_PYTEST = LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1 \
	PYTHONMALLOC=malloc PYTHONPATH=$(CURDIR)/$(ASAN_SITE) PIPELINE_SANITIZE=address \
	$(BIN)/python -P -m pytest -q -p no:cacheprovider --import-mode=append -m 'not slow'

.PHONY: asan-functional asan-others
# The command's own code, and what examples do in processes of their own, is Python's alone.
asan-functional:
	$(ASAN_PYTEST) tests/functional $(patsubst %,--ignore-glob='*/test_%.py',cli_* demo example_nodes howto \
		pysyncobj three_nodes)

asan-others:
	$(ASAN_PYTEST) tests/unit tests/fuzz/test_replay.py tests/fault/test_receiver_attacks.py tests/fault/test_stream_answers.py tests/fault/test_stream_core.py tests/fault/test_streams.py

# The thread sanitizer, preloaded in the same way, on what the loops share with other threads. It
# needs the address space laid out as it expects (setarch). Its reports are in build/tsan/report.*.
# The programs that tests start use the same build: the tree comes after it, and nowhere else.
# make tsan TSAN_TESTS='tests/functional/test_tls_sending.py -k reset'
TSAN_SITE := build/tsan/site
TSAN_TESTS ?= tests/stress tests/functional tests/fault/test_stream_answers.py tests/fault/test_stream_core.py tests/fault/test_streams.py tests/unit/test_tls_engine.py tests/fault/test_again_over_tls.py

.PHONY: tsan
tsan: build $(VENV)/.builders
	rm -rf build/tsan
	PIPELINE_SANITIZE=thread $(BIN)/python setup.py -q build --build-base build/tsan --build-lib $(TSAN_SITE)
	setarch -R env LD_PRELOAD="$$(gcc -print-file-name=libtsan.so)" \
		TSAN_OPTIONS=exitcode=66:report_thread_leaks=0:suppressions=$(CURDIR)/tests/tsan.supp:log_path=$(CURDIR)/build/tsan/report \
		PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/$(TSAN_SITE):$(CURDIR) PIPELINE_SANITIZE=thread \
		$(BIN)/python -m pytest -q -p no:cacheprovider --import-mode=append -m 'not slow' $(TSAN_TESTS)
	@! ls build/tsan/report.* 2> /dev/null

# The suite on a CPython without a GIL: PYTHON=PATH, one on the path, or one that is built out of
# Debian's source (once, in build/). make free-threaded FREE_TESTS='tests/stress -x'
.PHONY: free-threaded
free-threaded:
	python3 tools/free_threaded.py $(if $(filter-out python3,$(PYTHON)),--python $(PYTHON)) -- $(FREE_TESTS)

# libFuzzer under the same sanitizers, FUZZ_SECONDS on each target (tests/fuzz/README.md). Needs
# clang, and says so where there is none. make -j2 fuzz runs two at a time. A seed of 0 is another
# one each time.
FUZZ_SECONDS ?= 600
FUZZ_SEED ?= 0
FUZZ_TARGETS := message answer request receiver inbox tls stream_message stream_msgapp
FUZZ_SOURCES := $(wildcard pipeline/*.py pipeline/*/*.py tests/fuzz/*.py tests/fuzz/*.pyx)

.PHONY: fuzz fuzz-merge $(FUZZ_TARGETS:%=fuzz-%)

build/fuzz/.built: $(VENV)/.built $(VENV)/.builders $(SOURCES) $(FUZZ_SOURCES)
	$(BIN)/python tests/fuzz/fuzz.py build

fuzz: $(FUZZ_TARGETS:%=fuzz-%)

$(FUZZ_TARGETS:%=fuzz-%): fuzz-%: build/fuzz/.built
	$(BIN)/python tests/fuzz/fuzz.py run $* $(FUZZ_SECONDS) $(FUZZ_SEED)

# Makes the corpus that is checked in anew, of itself and what make fuzz has found.
fuzz-merge: build/fuzz/.built
	for target in $(FUZZ_TARGETS); do $(BIN)/python tests/fuzz/fuzz.py merge $$target || exit 1; done

clean:
	rm -rf build dist *.egg-info pipeline/*.so pipeline/*/*.so .venv benchmarks/bin

# The release: an sdist and a wheel for each Python at hand and each platform, in dist/; then each as
# a user gets it. make wheels WHEELS='--python 3.11 --platform manylinux_2_28_x86_64'; make test-wheel WHEELS='-- tests/unit'
.PHONY: wheels test-wheel
wheels:
	$(PYTHON) tools/wheels.py $(WHEELS)

test-wheel:
	$(PYTHON) tools/test_wheels.py $(WHEELS)

# What a public CI is to run, as its own linters see it; the workflow has not run anywhere yet.
.PHONY: lint-release
lint-release: $(VENV)/.created
	$(BIN)/python -m pip install --quiet 'cibuildwheel>=3.2'
	$(BIN)/cibuildwheel --print-build-identifiers --platform linux --archs x86_64,aarch64 .
	@if command -v go > /dev/null; then \
		GOBIN=$(CURDIR)/build/bin go install github.com/rhysd/actionlint/cmd/actionlint@v1.7.12 && \
		build/bin/actionlint .github/workflows/*.yml; \
	else echo 'actionlint is skipped: no Go'; fi
