"""The supported keys of PEFT's adapter_config.json. Any other feature that is on is refused."""

from __future__ import annotations

from typing import Any

from idlm.errors import InputError

UNDERSTOOD = {"peft_type", "r", "lora_alpha", "target_modules", "use_rslora", "init_lora_weights"}
HARMLESS = frozenset(
    [
        "auto_mapping",
        "base_model_name_or_path",
        "fan_in_fan_out",
        "inference_mode",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "task_type",
    ]
)
LAYERS = "layers_to_transform"
OFF: tuple[Any, ...] = (None, False, 0, "", "none", [], {})
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that keep the base's weights; pissa, olora, corda and loftq change
them."""


def refuse_features(config: dict[str, Any], where: str, entry: int = 0) -> None:
    """Check the content of an adapter_config.json; `where` is the file, for messages. It may list
    the adapted layers if those are the ones from `entry` on.

    Raises:
        InputError: it uses a PEFT feature that is not implemented; the message has key and value.
    """
    if config.get("peft_type") != "LORA":
        raise InputError(
            f"{where} has peft_type {config.get('peft_type')!r}; only LORA is supported"
        )
    start = config.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        raise InputError(
            f"{where} has init_lora_weights {start!r}, which changes the base; "
            "convert it to plain LoRA with peft"
        )
    for key, value in config.items():
        if key == LAYERS and entry and value == [*range(entry, entry + len(value or ()))]:
            continue
        if key not in UNDERSTOOD | HARMLESS and value not in OFF:
            raise InputError(
                f"{where} has {key} {value!r}, which is not supported; train the adapter without it"
            )
