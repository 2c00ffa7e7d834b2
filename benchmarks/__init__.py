"""Measurements. Run them from the repository root; results go to benchmarks/results."""
