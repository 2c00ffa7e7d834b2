"""What is understood of PEFT's adapter_config.json; anything else that is switched on is refused by
name."""

from __future__ import annotations

from typing import Any

from idlm.errors import InputError

UNDERSTOOD = {"peft_type", "r", "lora_alpha", "target_modules", "use_rslora", "init_lora_weights"}
HARMLESS = frozenset(
    [
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "task_type",
    ]
)
OFF: tuple[Any, ...] = (None, False, 0, "", "none", [], {})
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Ways to start a LoRA that leave the base's weights alone; others (pissa, olora, corda, loftq)
change them."""


def refuse_features(config: dict[str, Any], where: str) -> None:
    """Go through an adapter_config.json, of the file `where`.

    Raises:
        InputError: it uses a PEFT feature that is not implemented: it names the key and the value.
    """
    if config.get("peft_type") != "LORA":
        raise InputError(
            f"{where} has peft_type {config.get('peft_type')!r}; only LORA is supported"
        )
    start = config.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        raise InputError(
            f"{where} has init_lora_weights {start!r}, which changes the base; convert it to plain LoRA with peft"
        )
    for key, value in config.items():
        if key not in UNDERSTOOD | HARMLESS and value not in OFF:
            raise InputError(
                f"{where} has {key} {value!r}, which is not supported; train the adapter without it"
            )
