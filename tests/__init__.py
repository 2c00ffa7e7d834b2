"""Triton kernels run on the GPU where there is one, else in the interpreter, which must be chosen
before any import."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
