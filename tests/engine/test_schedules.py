"""Any schedule of requests gives each of them what the oracle gives it alone, and loses no slot and
no page."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from functools import lru_cache

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from idlm import SamplingParams
from idlm.config import EngineConfig
from idlm.decoding import reference
from idlm.engine.build import build_engine
from idlm.engine.engine import Engine
from idlm.engine.request import Result, Terms
from idlm.models.heads import HeadSpec
from idlm.models.idlm_model import Idlm
from tests.engine.tiny import (
    DTYPE,
    VOCAB,
    sliding_idlm,
    tiny_idlm,
    with_lookups,
    with_second_adapter,
)
from tests.heads import random_head

STEPS = int(os.environ.get("IDLM_SCHEDULE_STEPS", "3000"))
"""Engine steps of each of the two machines below, at least. `make soak` runs more."""
CHOICE = random.Random(0)
PROMPTS = [
    [CHOICE.randrange(3, VOCAB) for _ in range(length)]
    for length in (1, 2, 3, 5, 8, 13, 17, 24, 31, 40, 46)
]


ORACLE: dict[str, tuple[int, ...]] = {}


@lru_cache
def model(window: int | None = None, heads: bool = False, entry: int = 0) -> Idlm:
    plain = window is None
    idlm = tiny_idlm("qwen3", entry=entry) if plain else sliding_idlm("mistral", window, entry)
    idlm = with_second_adapter(idlm)
    if heads:
        for adapter, spec in enumerate((HeadSpec("mlp", 6, 7), HeadSpec("markov", 4, 5))):
            idlm.draft_heads[adapter] = random_head(idlm.model, spec, seed=adapter)
    return idlm


def alone(
    window: int | None, prompt: tuple[int, ...], params: SamplingParams, seed: int
) -> tuple[int, ...]:
    """AR by the oracle; at most as many tokens as the context holds."""
    key = repr((window, prompt, params, seed))  # a logit_bias cannot be hashed
    if key not in ORACLE:
        ORACLE[key] = oracle(model(window), prompt, params, seed)
    return ORACLE[key]


def oracle(
    idlm: Idlm, prompt: tuple[int, ...], params: SamplingParams, seed: int
) -> tuple[int, ...]:
    params = replace(params, max_tokens=min(params.max_tokens, idlm.context - len(prompt)))
    stops = {*params.stop_token_ids, *(() if params.ignore_eos else idlm.eos_ids)}
    request = reference.Request(prompt, params, idlm.mask_id, stops, seed)
    return tuple(reference.ar(idlm.forward, request).tokens)


def wish() -> SamplingParams:
    """Settings that together use every part of the law."""
    return SamplingParams(
        max_tokens=CHOICE.randint(1, 30),
        temperature=CHOICE.choice([0.0, 0.7, 1.0]),
        top_k=CHOICE.choice([0, 5]),
        top_p=CHOICE.choice([1.0, 0.8]),
        min_p=CHOICE.choice([0.0, 0.1]),
        repetition_penalty=CHOICE.choice([1.0, 1.3]),
        presence_penalty=CHOICE.choice([0.0, 0.5]),
        logit_bias=CHOICE.choice([{}, {5: 1.5}]),
        bad_words=CHOICE.choice([(), ((5, 5), (9, 4, 5), (11,))]),
        allowed_token_ids=CHOICE.choice([None, None, tuple(range(2, 20))]),
        stop_token_ids=CHOICE.choice([(), (7,)]),
        min_tokens=CHOICE.choice([0, 1]),
        ignore_eos=CHOICE.choice([True, True, False]),
    )


WISHES = [wish() for _ in range(16)]


class Schedules(RuleBasedStateMachine):
    """Requests come, go, are aborted and pre-empted while the engine steps."""

    record = False
    window: int | None = None
    """The sliding window of all layers: pages before it are freed."""
    heads = False
    """Whether drafts are chained."""
    entry = 0
    """The layer that MASK rows enter at."""
    lookups = False
    """Whether drafts are also looked up: alone in place of all outcomes, else beside MASK rows."""
    steps = 0

    def __init__(self) -> None:
        super().__init__()
        self.wanted: dict[str, tuple[tuple[int, ...], SamplingParams, int]] = {}
        self.done: dict[str, Result] = {}
        self.aborted: set[str] = set()

    @initialize(
        plan=st.sampled_from([(1, "all"), (2, "all"), (3, "chain"), (4, "all"), (4, (0, 2))]),
        late=st.booleans(),
        pages=st.integers(13, 30),
        prefill=st.sampled_from([3, 16, None]),
    )
    def build(self, plan: tuple[int, str], late: bool, pages: int, prefill: int | None) -> None:
        if self.lookups and plan[1] == "all":
            plan = (plan[0] + 1, "lookup")
        page_bytes = 2 * 2 * 4 * 2 * 8 * DTYPE.itemsize
        self.engine: Engine = build_engine(
            model(self.window, self.heads, self.entry),
            EngineConfig(
                *plan,
                max_num_seqs=4,
                kv_memory=pages * page_bytes,
                page_size=4,
                prefill_tokens=prefill,
                lookahead=int(late),
                record=self.record,
            ),
            adapters=["first", "second"],
        )
        if self.lookups and plan[1] != "lookup":
            with_lookups(self.engine)

    @rule(
        prompt=st.sampled_from(PROMPTS),
        params=st.sampled_from(WISHES),
        seed=st.integers(0, 1),
        adapter=st.sampled_from(["first", "second", None]),
        priority=st.integers(0, 1),
        samples=st.integers(1, 4),
    )
    def add(
        self,
        prompt: list[int],
        params: SamplingParams,
        seed: int,
        adapter: str | None,
        priority: int,
        samples: int,
    ) -> None:
        for sample in range(samples):  # the later ones meet the prefix cache
            terms = Terms(adapter, drafting=adapter is not None, priority=priority)
            name = self.engine.add(prompt, params, seed + sample, terms)
            self.wanted[name] = (tuple(prompt), params, seed + sample)

    @rule(steps=st.integers(1, 20))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self._collect()

    @precondition(lambda self: self.wanted)
    @rule(which=st.randoms())
    def abort(self, which) -> None:  # type: ignore[no-untyped-def]
        name = which.choice(sorted(self.wanted))
        if self.engine.abort(name):
            self.aborted.add(name)

    @precondition(lambda self: self.engine.scheduler.running)
    @rule()
    def preempt(self) -> None:
        self.engine.drain()
        if self.engine.scheduler.running:
            self.engine._preempt()

    @rule()
    def evict(self) -> None:
        """Other owners take all the cached pages."""
        pool = self.engine.scheduler.pool
        pool.release(pool.allocate(pool.free + pool.cached))

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check()
            pool = self.engine.scheduler.pool
            assert pool.free + pool.cached + pool.live == pool.total

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        while self.engine.busy:
            self._collect()
        self.nothing_is_lost()
        assert self.engine.scheduler.pool.live == 0 and not self.engine.scheduler.running
        assert set(self.done) == set(self.wanted)
        for name, result in self.done.items():
            expected = alone(self.window, *self.wanted[name])
            if name in self.aborted:
                assert result.finish_reason == "abort"
                assert tuple(result.token_ids) == expected[: len(result.token_ids)]
            else:
                assert tuple(result.token_ids) == expected
        type(self).steps += self.engine.metrics.steps

    def _collect(self) -> None:
        for update in self.engine.step():
            if update.result is not None:
                assert update.request_id not in self.done
                self.done[update.request_id] = update.result


class RecordedSchedules(Schedules):
    """With steps recorded as they are in use."""

    record = True


class EagerSchedules(Schedules):
    """With every step run anew."""

    record = False


class ChainedSchedules(Schedules):
    """With a draft head of another kind for each adapter, in recorded steps."""

    record = True
    heads = True


class LateSchedules(ChainedSchedules):
    """With MASK rows that skip the first layer."""

    entry = 1


class LateSlidingSchedules(Schedules):
    """So too with a sliding window, and every step run anew."""

    window = 3
    entry = 1


class LookupSchedules(Schedules):
    """With drafts looked up, alone and beside those of MASK rows, in recorded steps."""

    record = True
    lookups = True


class SlidingSchedules(Schedules):
    """With layers that see less than a page and less than a window, or a little more."""

    window = 3


class WiderSlidingSchedules(Schedules):
    window = 10


LIMITS = settings(
    max_examples=10, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("machine", "steps"),
    [
        (RecordedSchedules, STEPS),
        (EagerSchedules, STEPS),
        (ChainedSchedules, STEPS // 10),
        (LookupSchedules, STEPS // 10),
        (SlidingSchedules, STEPS // 20),
        (WiderSlidingSchedules, STEPS // 20),
        (LateSchedules, STEPS // 20),
        (LateSlidingSchedules, STEPS // 20),
    ],
)
def test_any_schedule(machine: type[Schedules], steps: int) -> None:
    machine.steps = 0
    while machine.steps < steps:
        run_state_machine_as_test(machine, settings=LIMITS)
