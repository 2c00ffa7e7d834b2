"""Every causal language model of the installed transformers, tried on a tiny random checkpoint.

    python -m benchmarks.families [FAMILY ...] [--out FILE]

For each family: what `inspect` says, whether `load` agrees, and in float64, to the end of the
context: greedy and seeded ISD against AR, and AR against transformers' own `generate`. Then a gated
LoRA on all linear layers is trained for two steps and loaded from its PEFT folder: ISD and AR with
it against the base. MASK is banned in all of them. A family that is refused has its reason. Where
its usual config is refused for a sliding window, it is tried again with one that is not below the
context.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from idlm import LLM, Idlm, SamplingParams, load
from idlm.environment import environment
from idlm.errors import InputError
from idlm.models.architecture import read_config
from idlm.models.checkpoint import inspect_checkpoint
from idlm.models.quiet import quiet
from idlm.models.sources import first_line
from tests.training.tiny import trained_adapter

VOCAB, MASK, CONTEXT, WINDOW = 40, 39, 48, 7
PROMPT = [5, 9, 3]
MOST_WEIGHTS = 20_000_000
NOISE = 0.1
"""Added to all weights, since some start as zeros and would hide what they do."""

SIZES = {
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "dff"), 48),
    "shared_expert_intermediate_size": 48,
    "moe_intermediate_size": 16,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **{"moe_num_experts": 4, "num_experts_per_tok": 2, "moe_k": 2, "n_group": 1, "topk_group": 1},
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    "attention_heads": 4,
    **{"emb_dim": 32, "n_words": VOCAB},
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    "head_dim": 8,
    "rotary_dim": 4,
    "hidden_size_per_layer_input": 4,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), CONTEXT),
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "is_decoder": True,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": None,
}
"""The sizes of multi-head latent attention."""
LAYERS = ["sliding_attention", "full_attention"]
OWN: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "num_hidden_layers": 2,
        "layer_types": LAYERS,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in LAYERS},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "doge": {"is_moe": False},
    "dots1": {"n_shared_experts": 1},
    "falcon": {"head_dim": None},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": LAYERS * 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            **dict.fromkeys(("hidden_size_per_layer_input", "vocab_size_per_layer_input"), 0),
        },
    },
    "gpt_neo": {
        "num_layers": 2,
        "attention_types": [[["global", "local"], 1]],
        "window_size": WINDOW,
    },
    **dict.fromkeys(
        ("lfm2", "lfm2_moe"),  # as published
        {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    ),
    "minimax_m3_vl_text": {  # as published
        "num_hidden_layers": 2,
        "layer_types": ["full_attention", "minimax_m3_sparse"],
    },
    "reformer": {"axial_pos_embds": False},
    "xglm": {"attention_heads": 4},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
"""What a family needs besides; None leaves a size out."""


def config_of(family: str, sizes: dict[str, Any]) -> PreTrainedConfig:
    """A config with these sizes, what the family needs, and transformers' defaults."""
    keys = sizes | OWN.get(family, {})
    return AutoConfig.for_model(family, **{k: v for k, v in keys.items() if v is not None})


def tiny_config(family: str, window: int) -> PreTrainedConfig:
    """A config with the keys that the family has; `window` where its usual config has one."""
    usual = config_of(family, {}).to_dict()
    sizes = SIZES | LATENT if "qk_rope_head_dim" in usual else SIZES
    keys = {key: value for key, value in sizes.items() if key in usual}
    if usual.get("sliding_window") is not None:
        keys["sliding_window"] = window
    return config_of(family, keys | {"mask_token_id": MASK, "block_size": 4})


def write_checkpoint(config: PreTrainedConfig, folder: Path) -> None:
    """Save a random float64 model without tokenizer.

    Raises:
        ValueError: it would not be tiny, since the sizes of parts of it have other names.
    """
    with torch.device("meta"):
        weights = AutoModelForCausalLM.from_config(copy.deepcopy(config)).num_parameters()
    if weights > MOST_WEIGHTS:
        raise ValueError(f"it would have {weights:,} weights")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=NOISE)
    model.save_pretrained(folder)


def tried(family: str) -> dict[str, Any]:
    """The row of a family."""
    row: dict[str, Any] = {"family": family, "class": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]}
    for window in (WINDOW, CONTEXT):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / family
            try:
                with quiet():
                    config = tiny_config(family, window)
                    write_checkpoint(config, path)
            except Exception as error:  # a family that no tiny model can be made of
                return row | {"reason": of_usual_config(family, path) or f"not tried: {error}"}
            windowed = getattr(config, "sliding_window", None) == window
            try:
                result = loaded(path)
            except Exception as error:  # the table goes on, and shows it
                wrong = f"{type(error).__name__}: {first_line(error)}"
                result = {"loads": False, "inspect_agrees": False, "reason": wrong}
        if windowed and window == WINDOW and "sliding" in result.get("reason", ""):
            row["window"] = result["reason"]
            continue
        return row | result
    raise AssertionError


def of_usual_config(family: str, path: Path) -> str:
    """Why the usual config of a family is refused; "" if it is not."""
    try:
        with quiet():
            config_of(family, {}).save_pretrained(path)
        read_config(path)
    except InputError as error:
        return plain(error, path)
    except Exception as error:  # not even that
        return f"not tried: {error}"
    return ""


def plain(error: InputError, path: Path) -> str:
    """The message without the folder."""
    return re.sub(rf"^'{re.escape(str(path))}'( \(\w+\))?:? ?", "", str(error))


def loaded(path: Path) -> dict[str, Any]:
    """What `inspect` and `load` say of a checkpoint, and what it decodes."""
    says = inspect_checkpoint(path)
    try:
        idlm = load(path, dtype="float64")
    except InputError as error:
        reason = plain(error, path)
        agrees = says.reason == f"refused: {error}" or says.reason.startswith("refused: ")
        return {"loads": False, "inspect_agrees": agrees, "reason": reason}
    agrees = says.can_decode_isd
    figures: dict[str, Any] = {}
    base = decoded(idlm)
    for kind, outputs in base.items():
        figures[f"{kind}_isd_is_ar"] = all(tokens == outputs["ar"] for tokens in outputs.values())
    length = len(base["greedy"]["ar"])
    figures["tokens"] = length
    figures["ar_is_transformers"] = base["greedy"]["ar"] == theirs(path, length)
    return {"loads": True, "inspect_agrees": agrees} | figures | adapted(path, base)


def adapted(path: Path, base: dict[str, dict[str, list[int]]]) -> dict[str, Any]:
    """The layers of a gated LoRA that is trained on the checkpoint, and whether decoding with it
    gives the tokens of the base."""
    with quiet(), tempfile.TemporaryDirectory() as place:
        try:
            adapter = trained_adapter(path, Path(place))
            with_it = decoded(load(path, adapter=adapter, dtype="float64"))
        except Exception as error:  # the table goes on, and shows it
            return {"lora_reason": f"{type(error).__name__}: {first_line(error)}"}
        updates = load_file(adapter / "adapter_model.safetensors").values()
        return {
            "lora_targets": inspect_checkpoint(adapter).adapter_targets,
            "lora_is_trained": all(bool(update.any()) for update in updates),
            "lora_isd_is_ar_is_base": all(
                tokens == base[kind]["ar"]
                for kind, outputs in with_it.items()
                for tokens in outputs.values()
            ),
        }


def decoded(idlm: Idlm) -> dict[str, dict[str, list[int]]]:
    """The tokens up to the end of the context, greedy and seeded, by AR and two plans of ISD."""
    plans = {"ar": (1, "all"), "all": (3, "all"), "chain": (3, "chain")}
    llms = {
        name: LLM(idlm, stride=stride, branches=branches, max_num_seqs=2, record=False)
        for name, (stride, branches) in plans.items()
    }
    kinds = {
        kind: SamplingParams(
            max_tokens=idlm.context - len(PROMPT), temperature=temperature, seed=7, ignore_eos=True
        )
        for kind, temperature in (("greedy", 0.0), ("seeded", 1.0))
    }
    return {
        kind: {name: llm.generate([PROMPT], params)[0].token_ids for name, llm in llms.items()}
        for kind, params in kinds.items()
    }


def theirs(path: Path, length: int) -> list[int]:
    """The tokens of transformers' `generate`."""
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
        model.set_experts_implementation("eager")  # the other takes no float64
        output = model.generate(
            torch.tensor([PROMPT]),
            do_sample=False,
            min_new_tokens=length,
            max_new_tokens=length,
            suppress_tokens=[MASK],
            eos_token_id=None,
        )
    return output[0, len(PROMPT) :].tolist()


def rows(families: list[str]) -> Iterator[dict[str, Any]]:
    for family in families:
        row = tried(family)
        print(json.dumps(row), file=sys.stderr, flush=True)
        yield row


def wrong(row: dict[str, Any]) -> bool:
    """Whether a row shows a fault."""
    checks = [value for key, value in row.items() if "_is_" in key or key == "inspect_agrees"]
    return not all(checks) or "lora_reason" in row


def main() -> int:
    """Exit status 1 if tokens differ, or if `inspect` and `load` do."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="all if none is named")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = list(rows(args.families or sorted(known)))
    report = {"dtype": "float64", "environment": environment(), "families": table}
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    good = sum(bool(row.get("loads")) for row in table)
    print(f"{good} of {len(table)} load; wrong: {[row['family'] for row in table if wrong(row)]}")
    return int(any(map(wrong, table)))


if __name__ == "__main__":
    raise SystemExit(main())
