# Every command a newcomer or CI needs; the scripts do the work and set up .venv first.
.PHONY: setup demo test check bench

setup:
	scripts/setup

demo:
	scripts/demo

test:
	scripts/test

check:
	scripts/check

bench:
	scripts/bench
