"""The folder of a whole model that is sharded over ranks: each rank writes a file of whole tensors.

No rank holds more than its file and one tensor.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from idlm.models.heads import head_tensors
from idlm.models.idlm_model import Idlm
from idlm.models.loading import save_full
from idlm.models.tensor_info import TensorInfo
from idlm.models.transposed import stored_layout
from idlm.models.weights import INDEX, SINGLE, file_tensors, whole
from idlm.training.processes import together

NUMBERED = re.compile(r"^.*?\.\d+\.")
"""The start of a weight's name up to the number of its decoder layer."""


def save_sharded(
    idlm: Idlm, folder: Path, block_size: int | None, accelerator: Accelerator
) -> None:
    """`save_full` of a sharded model; all ranks call it.

    Raises:
        InputError: a rank cannot write.
    """
    rank, ranks = accelerator.process_index, accelerator.num_processes
    mine = _share(idlm.model, rank, ranks)
    with together(accelerator, str(folder)):
        if accelerator.is_main_process:  # with the config and the tokenizer
            save_full(idlm, folder, block_size, mine)
            os.replace(folder / SINGLE, folder / _part(rank))
        else:
            if (head := idlm.draft_heads.get(0)) is not None:
                head_tensors(head)  # takes part in gathering what the first rank writes
            stored = revert_weight_conversion(idlm.model, mine)
            save_file(stored, folder / _part(rank), metadata={"format": "pt"})
    with together(accelerator, str(folder)):
        if accelerator.is_main_process:
            _join(folder, ranks)


def _part(rank: int) -> str:
    """A name that `save_pretrained` does not take for a file of an earlier save."""
    return f"rank-{rank}.safetensors"


def _share(model: PreTrainedModel, rank: int, ranks: int) -> dict[str, Tensor]:
    """This rank's tensors, whole, on the CPU and as a checkpoint stores them; about as many bytes
    for each rank. Tensors of a decoder layer stay together, since formats may merge some."""
    groups: dict[str, list[tuple[str, Tensor]]] = {}
    for name, weight in _stored(model):
        numbered = NUMBERED.match(name)
        groups.setdefault(numbered[0] if numbered else "", []).append((name, weight))
    total = sum(weight.nbytes for group in groups.values() for _, weight in group)
    done, mine = 0, {}
    for group in groups.values():
        size = sum(weight.nbytes for _, weight in group)
        is_mine = (done + size // 2) * ranks // max(total, 1) == rank
        done += size
        for name, weight in group:
            gathered = whole(weight)  # all ranks take part
            if is_mine:
                mine[name] = gathered.cpu().clone()
    return stored_layout(model, mine)


def _stored(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint has: weights that are shared once, and buffers that are not computed."""
    names = model.state_dict().keys()
    yield from model.named_parameters()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in names)


def _join(folder: Path, ranks: int) -> None:
    """Name the files of all ranks as transformers does, and write the index of their tensors."""
    tensors: dict[str, TensorInfo] = {}
    for rank in range(ranks):
        file = folder / f"model-{rank + 1:05}-of-{ranks:05}.safetensors"
        os.replace(folder / _part(rank), file)
        tensors |= file_tensors(file)
    index = {
        "metadata": {"total_size": sum(t.stop - t.start for t in tensors.values())},
        "weight_map": {name: t.file.name for name, t in sorted(tensors.items())},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
