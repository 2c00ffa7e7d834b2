"""Kernels in Triton for a GPU and in C for a CPU (csrc/). Each has a PyTorch function with the same
signature."""
