"""What a search by Learning by Teaching costs, from measured passes: `python -m tests.benchmarks.passes`."""
