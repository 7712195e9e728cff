# make setup   what the demo and the tests need, by apt and in .venv
# make demo    the main job: a host played in a throwaway namespace, before and after, in about a minute
# make test    all tests; those with real namespaces need root or a user namespace
# make check   linters, types, and the tests that need no privileges
# make fuzz    property tests on examples that nobody tried before
.PHONY: setup demo test check fuzz bpf clean

setup: .venv/.ready

.venv/.ready: pyproject.toml tools/setup
	tools/setup

demo: .venv/.ready
	.venv/bin/netslot demo --out out

test: check
	.venv/bin/python -m pytest -q -n 2 --dist worksteal tests/kernel tests/e2e

check: .venv/.ready
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/python -m pytest -q -n 2 --dist worksteal tests/unit

fuzz: .venv/.ready
	.venv/bin/python -m pytest -q --hypothesis-profile=new tests/unit

bpf:
	$(MAKE) -C src/netslot/bpf

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis out
