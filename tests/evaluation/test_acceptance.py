"""Alpha against sums by hand, loops over windows, and what the engine accepts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from idlm.baselines.llada import Llada
from idlm.baselines.sdar import Sdar, TwoThresholds
from idlm.baselines.written import law_of
from idlm.cli import app
from idlm.errors import InputError
from idlm.evaluation.acceptance import Item, Tally, measure_baseline, measure_causal
from idlm.evaluation.laws import Pairs, causal_logits, draft_pairs, lookup_pairs
from idlm.models.idlm_model import Idlm
from idlm.models.loading import load
from idlm.params import SamplingParams
from tests.training import tiny

SAMPLED = SamplingParams(temperature=1.0, max_tokens=12, seed=0)


def test_sums_by_hand() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]], dtype=torch.float64)
    q = torch.tensor([[0.2, 0.7, 0.1], [0.0, 0.15, 0.85]], dtype=torch.float64)
    tally = Tally()
    for _ in range(2):
        tally.add(Pairs(torch.tensor([1, 2]), torch.tensor([1, 3]), p.log(), q.log()))
    report = tally.to_json()
    assert [one["tokens"] for one in report["by_depth"]] == [2, 0, 2]
    first, _, third = report["by_depth"]
    assert (first["alpha"], third["alpha"]) == (pytest.approx(0.6), pytest.approx(0.9))
    assert (first["ratio"], third["ratio"]) == (pytest.approx(3 / 7), pytest.approx(0.8 / 0.85))
    assert (first["argmax"], third["argmax"], report["argmax"]) == (0, 1, 0.5)
    assert report["alpha"] == pytest.approx(0.75)
    bins = report["calibration"]["bins"]
    assert [one["tokens"] for one in bins] == [2, 2]
    assert report["calibration"]["error"] == pytest.approx((0.7 + 0.15) / 2)


def drafts_by_loops(
    idlm: Idlm, text: list[int], first: int, drafts: int
) -> dict[tuple, torch.Tensor]:
    """The law of each (token's index, depth): a window alone, after the text before it."""
    found = {}
    for start in range(first, len(text) - 1):
        for depth in range(1, min(drafts, len(text) - 1 - start) + 1):
            rows = torch.tensor(text[:start] + [idlm.mask_id] * depth)
            causal = torch.ones(len(rows), len(rows), dtype=torch.bool).tril()
            logits = idlm.forward(rows, torch.arange(len(rows)), causal)[-1]
            found[start + depth, depth] = logits.index_fill(
                0, torch.tensor(idlm.mask_id), -torch.inf
            ).log_softmax(0)
    return found


def test_drafts_are_those_of_every_window() -> None:
    idlm, text, first = tiny.model("lora"), [3, 4, 5, 6, 7, 8, 9, 2], 3
    law = law_of(idlm, SAMPLED)
    pairs = draft_pairs(idlm, text, first, 3, law)
    wanted = drafts_by_loops(idlm, text, first, 3)
    assert len(pairs.tokens) == len(wanted)
    log_p, seen = law(causal_logits(idlm, text)), set()
    for token, depth, p, q in zip(*pairs, strict=True):
        at = text.index(int(token))
        seen.add((at, int(depth)))
        torch.testing.assert_close(q, wanted[at, int(depth)])
        torch.testing.assert_close(p, log_p[at - 1])
    assert seen == wanted.keys()


def looked_up_by_loops(text: list[int], first: int, drafts: int) -> list[tuple[int, int, int]]:
    """The drafts that are reached: token, depth, and the place that each is for."""
    found = []
    for length in range(first + 1, len(text)):
        before = text[:length]
        matches = [
            (size, end)
            for end in range(1, length)
            for size in range(1, min(end, 8) + 1)
            if before[end - size : end] == before[length - size :]
        ]
        if not matches:
            continue
        _, end = max(matches)
        ahead = (before[end:] * drafts)[:drafts]
        for depth, token in enumerate(ahead, 1):
            if length + depth - 1 < len(text) and (
                ahead[: depth - 1] == text[length : length + depth - 1]
            ):
                found.append((token, depth, length + depth - 1))
    return found


def test_lookup_drafts_are_those_that_are_reached() -> None:
    idlm, text, first = tiny.model("lora"), [3, 4, 5, 6, 4, 5, 6, 7, 7, 7, 4, 5, 8, 9], 3
    law = law_of(idlm, SAMPLED)
    pairs = lookup_pairs(idlm, text, first, 3, law)
    wanted = looked_up_by_loops(text, first, 3)
    assert list(zip(pairs.tokens.tolist(), pairs.depth.tolist(), strict=True)) == [
        (token, depth) for token, depth, _ in wanted
    ]
    log_p, tally = law(causal_logits(idlm, text)), Tally()
    chances = [float(log_p[place - 1, token].exp()) for token, _, place in wanted]
    tally.add(pairs)
    assert tally.to_json()["alpha"] == pytest.approx(sum(chances) / len(chances))
    assert {depth for _, depth, _ in wanted} == {1, 2, 3}


def test_lookup_of_the_engine_is_measured(checkpoint: Path) -> None:
    words = ("--method", "lookup", "--stride", "3", "--temperature", "0", "--max-tokens", "24")
    done = CliRunner().invoke(app, ["accept", str(checkpoint / "base"), *words, "--json"])
    report = json.loads(done.stdout)
    assert report["method"] == "lookup" and report["stride"] == 3
    assert report["rows_per_token"] == pytest.approx(3 / report["tpf"])
    assert report["tpf_expected"] is None and report["environment"]["threads"] >= 1
    causal = report["definitions"]["causal"]
    assert causal["tokens"] == sum(one["tokens"] for one in causal["by_depth"]) > 0


def questions(idlm: Idlm, count: int) -> list[Item]:
    from idlm.nano.problems import held_out_problems

    chats = [[{"role": "user", "content": one.question}] for one in held_out_problems(count)]
    domains = ("odd", "even")
    return [
        Item(ids, (("domain", domains[at % 2]),))
        for at, ids in enumerate(idlm.encoder.chats(chats))
    ]


def test_ar_accepts_itself_and_nano_what_the_engine_accepts() -> None:
    idlm = load("nano")
    items, params = questions(idlm, 4), SamplingParams(temperature=1.0, max_tokens=160, seed=0)
    ar = measure_causal(idlm, items[:2], params, 1)
    assert ar["definitions"]["causal"]["alpha"] == pytest.approx(1, abs=1e-4)
    isd = measure_causal(idlm, items, params, 4)
    causal = isd["definitions"]["causal"]
    for one, share in zip(causal["by_depth"], isd["accepted"], strict=True):
        assert one["alpha"] == pytest.approx(share, abs=0.04)
    assert isd["tpf_expected"] == pytest.approx(isd["tpf_decode"], rel=0.06)
    assert isd["rows_per_token"] == pytest.approx(16 / isd["tpf"])
    groups = causal["by_domain"]
    assert sum(group["tokens"] for group in groups.values()) == causal["tokens"]


@pytest.mark.parametrize(
    "rule", [Sdar(3, 3, "dynamic", 0.4), TwoThresholds(4, 0.3, 0.3), Llada(6, 2)], ids=str
)
def test_baselines_under_both_definitions(rule) -> None:
    idlm = tiny.model()
    items = [Item([3, 4, 5], (("language", "de"),)), Item([6])]
    report = measure_baseline(idlm, items, SAMPLED, rule)
    assert list(report["definitions"]) == ["left_to_right", "reference_tokens"]
    for found in report["definitions"].values():
        assert found["tokens"] == report["answer_tokens"]
        assert 0 < found["alpha"] < 1 and len(found["by_depth"]) <= rule.block
        assert list(found["by_language"]) == ["de"]
    assert report["tpf"] == report["answer_tokens"] / report["forwards"]


def test_blocks_of_one_token_are_ar_and_accept_themselves() -> None:
    report = measure_baseline(tiny.model(), [Item([3, 4, 5])], SAMPLED, Sdar(1, 1))
    for found in report["definitions"].values():
        assert found["alpha"] == pytest.approx(1, abs=1e-6)


def test_penalties_are_refused() -> None:
    with pytest.raises(InputError, match="temperature"):
        measure_causal(tiny.model(), [Item([3])], SamplingParams(presence_penalty=1.0), 1)


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["accept", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_command(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "Mia has 3 apples.", "domain": "maths"}, {"prompt": "Hi"}]
    file.write_text("\n".join(map(json.dumps, rows)))
    shared = (file, "--max-tokens", 8, "--temperature", 1, "--seed", 1)
    report = json.loads(run("nano", *shared, "--json"))
    assert report["method"] == "idlm" and len(report["accepted"]) == 3
    assert list(report["definitions"]["causal"]["by_domain"]) == ["maths"]
    table = run("nano-full", *shared, "--method", "sdar", "--block", 2)
    assert "left to right" in table and "reference tokens" in table and "TPF" in table


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("nano-base", "--method", "idlm"), "no drafts"),
        (("nano", "--method", "sdar"), "adapter"),
        (("nano", "--block", 4), "--block"),
        (("nano", "--method", "llada2", "--steps", 4), "--steps"),
        (("nano-full", "--method", "sdar", "--block", 4, "--steps", 5), "5 steps"),
    ],
)
def test_options_that_do_not_fit_are_refused(arguments, named: str) -> None:
    result = CliRunner().invoke(app, ["accept", *map(str, arguments), "--max-tokens", "4"])
    assert result.exit_code != 0 and named in result.output
