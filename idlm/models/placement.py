"""Where weights go and in which type: the names that users give."""

from __future__ import annotations

import torch

from idlm.errors import InputError
from idlm.models.sources import first_line

FLOATS = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def named_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """The torch dtype of a name; "auto" as it is.

    Raises:
        InputError: there is no such dtype.
    """
    if dtype == "auto" or dtype in FLOATS.values():
        return dtype
    if dtype not in FLOATS:
        raise InputError(f"dtype {str(dtype)!r} is unknown; use auto, {', '.join(FLOATS)}")
    return FLOATS[str(dtype)]


def device_of(device: str | torch.device) -> torch.device:
    """The device with its index, such as cuda:0.

    Raises:
        InputError: there is no such device.
    """
    return torch.empty(0, device=usable_device(device)).device


def usable_device(device: str | torch.device) -> str | torch.device:
    """The device, if it can hold a model. No context of a GPU is made for the answer.

    Raises:
        InputError: there is no such device.
    """
    try:
        wanted = torch.device(device)
        if wanted.type == "cuda" and torch.cuda.is_available():
            if (wanted.index or 0) >= torch.cuda.device_count():
                raise RuntimeError(f"there are {torch.cuda.device_count()} of them")
            return device
        torch.empty(1, device=wanted).item()  # fails for "meta" too, which holds nothing
        return device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f"device {str(device)!r} cannot be used ({first_line(error)}); "
            "use cpu, or cuda where there is one"
        ) from None
