"""A differential fuzzer: random programs, lowered, against twins in plain autograd. `python -m tests.fuzz --help`."""
