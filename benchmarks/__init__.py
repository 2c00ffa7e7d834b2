"""Measurements: run from the repository root; figures go to benchmarks/results."""
