"""`try_config`: what `load` would find of a model's architecture, without its weights.

A small model of the same config, with random weights, goes through the check of `load`. Its depth
and its kinds of layers are the config's where that is affordable; heads, sizes of layers and
vocabulary are cut.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from idlm.errors import InputError
from idlm.models import experts
from idlm.models.check import check_architecture, prepare
from idlm.models.idlm_model import Idlm
from idlm.models.quiet import quiet
from idlm.models.routes import implementation
from idlm.models.sources import first_line

MOST_WEIGHTS = (50_000_000, 200_000_000)
"""Of the small model: about a second, and 200 MB; if there is none, four seconds."""
VOCABULARY, INNER, LAYERS = 256, 64, 8
NOISE = 0.1
"""Added to all weights: some start as zeros, and would hide what they do."""


def try_config(config: PreTrainedConfig, name: str, max_model_len: int | None = None) -> str | None:
    """Check the architecture of a config.

    Returns:
        why it could not be tried, if every small form of it is too large; None if it was.

    Raises:
        InputError: `load` would refuse it.
    """
    too_large = problem = ""
    for most, smaller in itertools.product(MOST_WEIGHTS, _smaller(config)):
        try:
            model = _small(smaller, most)
        except _TooLarge as error:
            too_large = str(error)
        except Exception as error:  # a family takes not every size, and raises anything
            problem = f"{type(error).__name__}: {first_line(error)}"
        else:
            prepare(model)
            check_architecture(Idlm(model, None, 0, name=name, max_model_len=max_model_len))
            return None
    if not too_large:
        raise InputError(
            f"{name!r} cannot be loaded as {config.model_type} ({problem}); use another model"
        )
    return too_large


class _TooLarge(Exception):
    pass


def _small(config: PreTrainedConfig, most: int) -> PreTrainedModel:
    """A random model of at most `most` weights that transformers can run."""
    with quiet(), torch.random.fork_rng(devices=[]):
        with torch.device("meta"):
            weights = _model(config).num_parameters()
        if weights > most:
            raise _TooLarge(f"its smallest form has {weights:,} weights")
        torch.manual_seed(0)
        model = _model(config)
        model.train(False)
        with torch.inference_mode():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight), alpha=NOISE)
            model(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=False)
    return model


def _model(config: PreTrainedConfig) -> PreTrainedModel:
    config = copy.deepcopy(config)
    options: dict[str, Any] = {"dtype": torch.float32, "experts_implementation": experts.NAME}
    options["attn_implementation"] = implementation(config)
    make: Any = AutoModelForCausalLM.from_config
    model: PreTrainedModel = make(config, **options)
    return model


def _smaller(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Smaller configs, the most faithful first."""
    for narrow, shallow in itertools.product((True, False), (False, True)):
        keys = config.to_dict()
        _cut_vocabulary(keys)
        if shallow:
            _cut_depth(keys)
        if narrow:
            _cut_width(keys)
        with suppress(Exception):  # a config class takes not every size
            yield type(config).from_dict(keys)


def _cut_vocabulary(keys: dict[str, Any]) -> None:
    for key, value in keys.items():
        if key.startswith("vocab_size") and isinstance(value, int):
            keys[key] = min(VOCABULARY, value)
    for key, value in keys.items():
        if key.endswith("_token_id") and isinstance(value, int):
            keys[key] = min(value, keys["vocab_size"] - 1)


def _cut_depth(keys: dict[str, Any]) -> None:
    """The first layers, in every list too that has an entry for each."""
    depth = keys.get("num_hidden_layers")
    for key, value in keys.items():
        if isinstance(value, list) and len(value) == depth:
            keys[key] = value[:LAYERS]
    for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        if isinstance(keys.get(key), int):
            keys[key] = min(LAYERS, keys[key])


def _cut_width(keys: dict[str, Any]) -> None:
    """Few heads and small feed-forward layers."""
    for key, value in keys.items():
        if isinstance(value, int) and (key.endswith("intermediate_size") or "ffn" in key):
            keys[key] = min(INNER, value)
    if "n_inner" in keys:
        keys["n_inner"] = INNER
    _cut_heads(keys)


def _cut_heads(keys: dict[str, Any]) -> None:
    """At most two key/value heads with two query heads each, or four heads; a head keeps its
    size."""
    named = {
        name: next((key for key in names if isinstance(keys.get(key), int)), None)
        for name, names in {
            "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
            "groups": ("num_key_value_heads", "num_kv_heads"),
            "hidden": ("hidden_size", "n_embd", "d_model"),
        }.items()
    }
    if named["heads"] is None or named["hidden"] is None:
        return
    heads, hidden = keys[named["heads"]], keys[named["hidden"]]
    groups = heads if named["groups"] is None else keys[named["groups"]]
    if heads % groups or hidden % heads:
        return
    fewer = min(4 if groups == heads else 2, groups)
    keys[named["heads"]] = fewer * min(2, heads // groups)
    keys[named["hidden"]] = hidden // heads * keys[named["heads"]]
    if named["groups"] is not None:
        keys[named["groups"]] = fewer
