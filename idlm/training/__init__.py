"""Conversion of a causal LM into an I-DLM, and the training of its base: one config, one run."""

from idlm.extras import need

need("train", "training")
