"""GPU kernels in Triton, each beside its PyTorch twin behind one signature."""
