"""Self-distillation: the model's own responses, the same each time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from idlm.decoding import reference
from idlm.errors import InputError
from idlm.training.config import DataConfig
from idlm.training.distill import distill
from tests.training import tiny


def settings(**changes: Any) -> DataConfig:
    return DataConfig(
        **{"source": "self", "examples": 10, "max_tokens": 8, "generate_batch": 4, **changes}
    )


def prompts_file(folder: Path, prompts: list[Any]) -> str:
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": p}) + "\n" for p in prompts)
    )
    return str(folder / "prompts.jsonl")


def test_responses_are_a_function_of_the_seed(tmp_path: Path) -> None:
    idlm = tiny.model(dtype=torch.float32)
    before = torch.get_rng_state()
    first = distill(settings(), idlm, tmp_path / "a.jsonl")
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    second = distill(settings(), idlm, tmp_path / "b.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert [e.response for e in first] == [e.response for e in second]
    other = distill(settings(seed=1), idlm, tmp_path / "c.jsonl")
    assert [e.response for e in first] != [e.response for e in other]
    assert all(e.prompt == [1] and 1 <= len(e.response) <= 8 for e in first)
    assert all(2 not in e.response[:-1] for e in first)


@pytest.mark.parametrize("kept", [1, 3, 5, 7, 10])
def test_a_generation_cut_off_continues_to_the_same_file(tmp_path: Path, kept: int) -> None:
    idlm = tiny.model(dtype=torch.float32)
    distill(settings(), idlm, tmp_path / "a.jsonl")
    whole = (tmp_path / "a.jsonl").read_text()
    lines = whole.splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text("".join(lines[:kept]) + lines[kept][:5])
    distill(settings(), idlm, tmp_path / "a.jsonl")
    assert (tmp_path / "a.jsonl").read_text() == whole


def test_a_complete_file_is_read_without_the_model(tmp_path: Path) -> None:
    idlm = tiny.model(dtype=torch.float32)
    first = distill(settings(), idlm, tmp_path / "a.jsonl")
    with torch.no_grad():
        idlm.model.get_input_embeddings().weight.zero_()
    assert distill(settings(), idlm, tmp_path / "a.jsonl") == first


def test_greedy_responses_to_padded_prompts_are_those_of_each_alone(tmp_path: Path) -> None:
    idlm = tiny.model(dtype=torch.float64)
    prompts = [[3], [4, 5, 6, 7], [8, 9], [5] * 6]
    path = prompts_file(tmp_path, prompts)
    together = distill(
        settings(prompts=path, examples=None, temperature=0.0), idlm, tmp_path / "a.jsonl"
    )
    for prompt, example in zip(prompts, together, strict=True):
        tokens = list(prompt)
        for _ in range(8):
            visible = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
            logits = idlm.forward(torch.tensor(tokens), torch.arange(len(tokens)), visible)
            # MASK, the last id, is never emitted
            tokens.append(int(logits[-1, : idlm.mask_id].argmax()))
            if tokens[-1] == 2:
                break
        assert example.prompt + example.response == tokens


def test_other_settings_do_not_reuse_the_file(tmp_path: Path) -> None:
    idlm = tiny.model(dtype=torch.float32)
    distill(settings(), idlm, tmp_path / "a.jsonl")
    with pytest.raises(InputError, match="temperature 1.0, now it is 0.5"):
        distill(settings(temperature=0.5), idlm, tmp_path / "a.jsonl")


def test_bad_prompts_are_named(tmp_path: Path) -> None:
    idlm = tiny.model(dtype=torch.float32)
    with pytest.raises(InputError, match="line 2: the prompt has no tokens"):
        distill(settings(prompts=prompts_file(tmp_path, [[3], []])), idlm, tmp_path / "a.jsonl")
    with pytest.raises(InputError, match="line 1: the prompt has 48 tokens, the limit is 48"):
        distill(
            settings(prompts=prompts_file(tmp_path, [[3] * tiny.CONTEXT])),
            idlm,
            tmp_path / "a.jsonl",
        )
    with pytest.raises(InputError, match="data.examples is missing"):
        distill(settings(examples=None), idlm, tmp_path / "a.jsonl")
    with pytest.raises(InputError, match="cannot read 'nowhere'"):
        distill(settings(prompts="nowhere"), idlm, tmp_path / "a.jsonl")


DEFAULTS: dict[str, dict[str, Any]] = {
    "penalty": {"repetition_penalty": 1.7, "do_sample": False},
    "bans": {"suppress_tokens": [3, 4, 5, 6], "bad_words_ids": [[7], [8]], "do_sample": False},
    "longer": {"min_new_tokens": 6, "eos_token_id": [2, 9, 10, 11, 12], "do_sample": False},
    "nothing transformers alone applies": {"no_repeat_ngram_size": 1, "do_sample": False},
}


@pytest.mark.parametrize("keys", DEFAULTS.values(), ids=DEFAULTS)
def test_responses_are_what_the_model_decodes(tmp_path: Path, keys: dict[str, Any]) -> None:
    """With the defaults of its generation config and its ends, and nothing else."""
    idlm = tiny.model(dtype=torch.float64)
    own = idlm.model.generation_config
    own.update(**keys)
    prompts = [[3], [4, 5, 6, 7], [8, 9, 8]]
    path = prompts_file(tmp_path, prompts)
    examples = distill(settings(prompts=path, examples=None), idlm, tmp_path / "a.jsonl")
    assert idlm.model.generation_config is own
    params = idlm.sampling({"max_tokens": 8})
    assert params.greedy
    for prompt, example in zip(prompts, examples, strict=True):
        ar = reference.ar(idlm.forward, prompt, params, idlm.mask_id, idlm.eos_ids, 0)
        assert example.response == ar.tokens


def test_filters_of_the_generation_config_and_the_temperature_of_the_run(tmp_path: Path) -> None:
    idlm = tiny.model(dtype=torch.float32)
    plain = distill(settings(), idlm, tmp_path / "plain.jsonl")
    assert distill(settings(temperature=1.0), idlm, tmp_path / "same.jsonl") == [
        replace(example, row=example.row.replace("plain", "same")) for example in plain
    ]
    idlm = tiny.model(dtype=torch.float32)
    idlm.model.generation_config.update(top_k=1, temperature=5.0)
    narrow = distill(settings(), idlm, tmp_path / "narrow.jsonl")
    assert len({tuple(example.response) for example in narrow}) == 1  # the likeliest each time
    assert '"top_k": 1' in (tmp_path / "narrow.jsonl").read_text()
    del idlm.__dict__["sampling_defaults"]
    idlm.model.generation_config.top_k = None
    with pytest.raises(InputError, match="top_k 1, now it is None"):
        distill(settings(), idlm, tmp_path / "narrow.jsonl")
    again = json.loads((tmp_path / "narrow.jsonl").read_text().splitlines()[0])
    assert again["temperature"] == 5.0
