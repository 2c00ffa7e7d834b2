"""What the package's extras bring, and the one error for an extra that is not installed."""

from __future__ import annotations

from importlib.util import find_spec

from idlm.errors import InputError

MODULES = {
    "serve": (
        *("fastapi", "fastapi_offline", "uvicorn", "httptools", "httpx2", "uvloop"),
        *("msgspec", "prometheus_client"),
    ),
    "train": ("accelerate", "yaml"),
    "data": ("datasets", "pyarrow"),
    "chat": ("openai",),
    "eval": ("lm_eval", "openai"),
    "gguf": ("gguf", "accelerate"),
    "report": ("matplotlib",),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "ray": ("ray",),
}
"""By extra: the modules that the code behind it imports."""


def need(extra: str, what: str) -> None:
    """Check that an extra is installed before the code behind it is imported.

    Raises:
        InputError: a module of it is missing; the message begins with `what` and names the fix.
    """
    for module in MODULES[extra]:
        if find_spec(module) is None:
            raise InputError(
                f"{what} needs the package {module}; install it with pip install 'idlm[{extra}]'"
            )
