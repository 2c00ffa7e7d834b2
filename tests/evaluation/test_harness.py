"""Our engine as a model of the harness: the figures of its own model, and the same after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from idlm import LLM
from idlm.errors import InputError
from tests.evaluation import suite_files
from tests.waiting import HANG_SECONDS

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from idlm.evaluation import paired, runner  # noqa: E402
from idlm.evaluation.engine_model import EngineModel  # noqa: E402
from idlm.evaluation.suites import named  # noqa: E402
from idlm.evaluation.tasks import Way  # noqa: E402

TEXTS = ["Mia has 3 apples.", "Sam buys 12 pens. He loses 5", "The answer is 4 ", ""]
EXACT = {"dtype": "float64", "max_num_seqs": 4, "threads": 1}


class WithoutMask(HFLM):  # type: ignore[misc]
    """The harness's model of a checkpoint whose MASK, which never comes out, has no probability.

    In a random checkpoint it would have its share; in a real one it is an unused row.
    """

    def _model_call(self, *arguments: Any, **named: Any) -> Any:
        logits = super()._model_call(*arguments, **named)
        logits[..., self.tokenizer.mask_token_id] = -float("inf")
        return logits


def asks(kind: str, arguments: list[Any]) -> list[Instance]:
    return [Instance(kind, {}, one, at) for at, one in enumerate(arguments)]


@pytest.fixture(scope="module")
def models(checkpoint: Path) -> tuple[HFLM, EngineModel]:
    base = str(checkpoint / "base")
    theirs = WithoutMask(pretrained=base, dtype="float64", device="cpu", batch_size=1)
    return theirs, EngineModel(base, **EXACT)


def test_likelihoods_are_those_of_the_harness(models: tuple[HFLM, EngineModel]) -> None:
    long = " ".join(TEXTS) * 9  # longer than the context, 160 tokens
    pairs = [(text, end) for text in TEXTS for end in (" It is 7.", " 12 pens\n")]
    scores = [
        model.loglikelihood(asks("loglikelihood", [*pairs, (long[:120], " is 7")]))
        for model in models
    ]
    for (left, greedy), (right, also) in zip(*scores, strict=True):
        assert right == pytest.approx(float(left), abs=1e-9) and greedy == also
    rolling = [
        model.loglikelihood_rolling(asks("loglikelihood_rolling", [(text,) for text in TEXTS[:3]]))
        for model in models
    ]
    assert rolling[1] == pytest.approx([float(one) for one in rolling[0]], abs=1e-9)
    (windows,) = models[1].loglikelihood_rolling(asks("loglikelihood_rolling", [(long,)]))
    assert windows < 0


@pytest.mark.parametrize("until", [[], [" "], ["7", "<|im_end|>"]])
def test_texts_are_those_of_the_harness(models: tuple[HFLM, EngineModel], until: list[str]) -> None:
    options = {"until": until, "max_gen_toks": 24, "do_sample": False}
    prompts = [*TEXTS[:3], " ".join(TEXTS) * 9]  # the last one loses its beginning
    theirs, ours = (
        model.generate_until(asks("generate_until", [(text, dict(options)) for text in prompts]))
        for model in models
    )
    assert ours == theirs and any(theirs)


def test_a_chat_is_that_of_the_harness(models: tuple[HFLM, EngineModel]) -> None:
    talk = [{"role": "user", "content": "Mia has 3."}, {"role": "assistant", "content": "Well"}]
    for more in (True, False):
        left, right = (model.apply_chat_template(talk, more) for model in models)
        assert left == right


def test_samples_have_seeds_of_their_own(models: tuple[HFLM, EngineModel]) -> None:
    options = {"max_gen_toks": 12, "do_sample": True, "temperature": 1.0, "top_k": 50}
    requests = asks("generate_until", [("Mia has", options)] * 2)
    first = models[1].generate_until(requests)
    assert len(set(first)) == 2 and models[1].generate_until(requests) == first


def test_an_option_that_is_unknown(models: tuple[HFLM, EngineModel]) -> None:
    with pytest.raises(InputError, match="generation option 'beams' is unknown"):
        models[1].generate_until(asks("generate_until", [("Mia", {"beams": 2})]))


def test_thoughts_are_cut_and_may_hold_stop_texts(checkpoint: Path) -> None:
    llm = LLM(str(checkpoint / "base"), logprobs_mode="raw_logprobs", stride=1, threads=1)
    plain = EngineModel(llm).generate_until(
        asks("generate_until", [("Mia", {"max_gen_toks": 24, "until": []})])
    )[0]
    middle = plain[len(plain) // 2 : len(plain) // 2 + 3]
    cut = EngineModel(llm, think_end_token=middle).generate_until(
        asks("generate_until", [("Mia", {"max_gen_toks": 24, "until": [plain[:2]]})])
    )[0]
    rest = plain.rpartition(middle)[2].lstrip()
    assert cut == rest.split(plain[:2])[0]


def run(checkpoint: Path, data: Path, folder: Path, **more: Any) -> None:
    """The evaluation that is killed, and the one that is not; also called by a process."""
    options = {"adapter": str(checkpoint / "lora"), "stride": 3, "branches": "all", **more}
    stop = options.pop("stop_after", 10**9)
    model = EngineModel(str(checkpoint / "base"), **{**EXACT, **options})
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if done >= stop:
            os.kill(os.getpid(), signal.SIGKILL)

    sampled = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 10}
    way = Way(data, chat=False, generation=sampled)
    suites = named(["gpqa", "aime-25", "aime-24", "mt-bench"])
    runner.run(model, suites, way, folder, {"seed": 3}, lambda label, total: advance)


def test_a_kill_changes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    """SIGKILL within the second suite; then AR gives the same samples as ISD."""
    data = suite_files.write(tmp_path / "data")
    code = (
        "import sys; from pathlib import Path; from tests.evaluation.test_harness import run\n"
        "run(*map(Path, sys.argv[1:]), stop_after=9)"
    )
    words = [sys.executable, "-c", code, str(checkpoint), str(data), str(tmp_path / "killed")]
    root = Path(__file__).parents[2]
    killed = subprocess.run(words, cwd=root, timeout=HANG_SECONDS, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert not (tmp_path / "killed" / "results.json").exists()
    answers = (tmp_path / "killed" / "aime-25.journal.jsonl").read_text().splitlines()
    assert len(answers) == 1
    run(checkpoint, data, tmp_path / "killed")
    run(checkpoint, data, tmp_path / "whole")
    for file in sorted((tmp_path / "whole").glob("*.json*")):
        if file.name != "run.json" and ".journal." not in file.name:
            assert file.read_bytes() == (tmp_path / "killed" / file.name).read_bytes(), file.name
    speed = json.loads((tmp_path / "killed" / "run.json").read_text())["suites"]["aime-25"]
    assert (speed["answers"], speed["new_answers"]) == (2, 1) and speed["tpf"] > 1

    run(checkpoint, data, tmp_path / "ar", stride=1, branches="planner")
    found = paired.compare(tmp_path / "whole", tmp_path / "ar")
    assert {name: one["same_answers"] for name, one in found.items()} == {
        "gpqa": 1.0, "aime-25": 1.0, "aime-24": 1.0, "mt-bench": 1.0,
    }  # fmt: skip
