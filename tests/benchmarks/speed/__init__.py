"""Time and memory beside a hand-written loop and other libraries: `python -m tests.benchmarks.speed`."""
