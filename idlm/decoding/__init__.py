"""The mathematics of decoding: pure functions on tensors, without engine or I/O."""
