"""The mathematics of decoding: pure functions on tensors, no engine, no I/O, nothing of ours
imported from outside."""
