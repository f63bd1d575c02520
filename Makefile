# kiln: build, demonstrate, test. Every target is idempotent and installs what it needs.

TARGET  := x86_64-unknown-linux-gnu
OUT     := out
LIB     := $(OUT)/lib/kiln
SHARE   := $(OUT)/share
export KILN_LIB_DIR := $(CURDIR)/$(LIB)

.PHONY: help build share demo test test-nested test-callers faults fuzz bench lint kernel setup setup-tests clean

help:
	@echo "make build        install what is missing; build the guest kernel, the agent and kiln into $(OUT)/"
	@echo "make demo         build a real C project and run its tests inside a microVM, then hostile steps"
	@echo "make test         format, lints, licences and every test"
	@echo "make test-nested  kiln in a guest of kiln, to the end: cgroups of version 2, and systemd"
	@echo "make test-callers the engines of another release of Debian (RELEASE=trixie) and its QEMU drive kiln"
	@echo "make faults       300 kills at random moments and every other fault, with a table of what was killed when"
	@echo "make fuzz         libFuzzer on every parser of untrusted bytes, ten minutes each"
	@echo "make bench        start-up, memory, stdio and network figures, against a second command in the same run"

setup:
	@setup/install

setup-tests:
	@setup/install --tests

kernel: setup
	@kernel-config/build --output $(LIB)

build: kernel
	@echo "build: kiln (release)" && cargo build --locked --release --bin kiln
	@echo "build: agent" && cargo build --locked --profile agent --package kiln-agent
	@guest-agent/check-elf target/$(TARGET)/agent/kiln-agent
	@mkdir -p $(OUT)/bin $(LIB)
	@install -m 755 target/$(TARGET)/release/kiln $(OUT)/bin/kiln
	@install -m 755 target/$(TARGET)/agent/kiln-agent $(LIB)/kiln-agent
	@$(MAKE) --no-print-directory share
	@$(OUT)/bin/kiln --version

# Completions and manual pages, from the command line's own definition.
share:
	@mkdir -p $(SHARE)/man/man1 $(SHARE)/bash-completion/completions $(SHARE)/zsh/site-functions \
		$(SHARE)/fish/vendor_completions.d
	@$(OUT)/bin/kiln man $(SHARE)/man/man1
	@$(OUT)/bin/kiln completions bash >$(SHARE)/bash-completion/completions/kiln
	@$(OUT)/bin/kiln completions zsh >$(SHARE)/zsh/site-functions/_kiln
	@$(OUT)/bin/kiln completions fish >$(SHARE)/fish/vendor_completions.d/kiln.fish

demo: build
	@demo/run

lint: setup
	@cargo fmt --all --check
	@cargo clippy --locked --workspace --all-targets -- -D warnings
	@setup/check-dependencies

test: setup-tests build lint
	@cargo nextest run --locked --workspace --no-fail-fast

# One after the other: each is a machine within a machine.
test-nested: setup-tests build
	@KILN_NESTED_WHOLE=1 cargo test --locked --workspace --test nested -- --nocapture --test-threads=1

test-callers: setup-tests build
	@tests/callers/on-release $(or $(RELEASE),trixie)

# KILN_FAULT_SEED=N repeats the choices of an earlier run.
faults: setup-tests build
	@KILN_FAULT_RUNS=$${KILN_FAULT_RUNS:-300} KILN_FAULT_CROWD=$${KILN_FAULT_CROWD:-12} \
		cargo test --locked --workspace --test faults -- --nocapture --test-threads=1

fuzz:
	@fuzz/run

bench: build
	@cargo bench --locked --bench start
	@cargo bench --locked --bench steps
	@cargo bench --locked --package kiln-vmm --bench net_speed

clean:
	@rm -rf target $(OUT)
