"""Pages and pictures in docs/ that are generated from the code and from benchmarks/results."""
