"""Kernels: in Triton for a GPU and in C for a CPU (csrc/), each beside its PyTorch twin behind one
signature."""
