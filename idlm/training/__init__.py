"""Conversion of a causal LM into an I-DLM, and the training of its base: one config, one run."""

from importlib.util import find_spec

from idlm.errors import InputError

if find_spec("accelerate") is None:
    raise InputError("training needs the package accelerate; install it with pip install 'idlm[train]'")
