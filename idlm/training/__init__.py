"""Training: the conversion of a causal LM into an I-DLM, and the training of a base model."""

from idlm.extras import need

need("train", "training")
