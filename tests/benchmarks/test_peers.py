"""Peers speak the protocol and do the work that is timed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.peers import protocol
from benchmarks.peers.process import Peer
from idlm import load
from idlm.evaluation.workload import Request, workload

ROUNDS = 5


@pytest.fixture(scope="module")
def peer(checkpoint: Path) -> Iterator[Peer]:
    found = Peer(sys.executable, "transformers_generate.py", checkpoint / "base", threads=1)
    yield found
    found.close()


def recomputed(model: PreTrainedModel, request: Request) -> list[int]:
    """Greedy decoding without cache, batch or padding."""
    text = list(request.prompt_token_ids)
    with torch.inference_mode():
        for _ in range(request.max_tokens):
            text.append(int(model(input_ids=torch.tensor([text])).logits[0, -1].argmax()))
    return text[len(request.prompt_token_ids) :]


def test_transformers_gives_the_models_own_tokens_alone_and_in_padded_batches(
    peer: Peer, checkpoint: Path
) -> None:
    idlm = load(checkpoint / "base")
    requests = workload(idlm)(5, 1)
    stock = AutoModelForCausalLM.from_pretrained(checkpoint / "base", dtype=torch.float32)
    expected = [recomputed(stock, request) for request in requests]
    alone, batched = peer.run(requests, 1), peer.run(requests, 3)
    assert (
        [request.token_ids for request in alone.served]
        == [request.token_ids for request in batched.served]
        == expected
    )


def test_times_add_up(peer: Peer, checkpoint: Path) -> None:
    """A disturbance of the machine may come between the requests of one round, but not of every
    round."""
    requests = workload(load(checkpoint / "base"))(4, 1)
    shares = []
    for _ in range(ROUNDS):
        run = peer.run(requests, 1)
        spent = sum(r.ttft + r.tpot * (len(r.token_ids) - 1) for r in run.served)
        assert spent < run.seconds
        assert all(0 < r.tpot <= r.worst_gap < run.seconds for r in run.served)
        assert run.peak_memory_mb > 50 and run.cpu_seconds > 0
        shares.append(spent / run.seconds)
    assert max(shares) > 0.5
    assert (peer.engine, peer.mode) == ("transformers", "static") and set(peer.versions) == {
        "transformers",
        "torch",
    }


def test_a_peer_that_does_not_start_is_reported(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ended"):
        Peer(sys.executable, "no_such_script.py", tmp_path, threads=1)


def test_a_clock_stops_at_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([1.0, 3.0])
    monkeypatch.setattr(protocol, "perf_counter", lambda: next(now))
    clock = protocol.Clock(3, arrival=0.5)
    clock.extend([4, 5])
    clock.extend([6, 7])
    clock.extend([8])
    assert clock.report() == {"token_ids": [4, 5, 6], "ttft": 0.5, "tpot": 1.0, "worst_gap": 2.0}
