"""`Engine`: many requests, one batch, step by step.

A request's life:
    1. `add` queues it; the intake refuses what cannot be done before it costs anything
    2. the scheduler gives it a slot and pages, those of the prefix cache first
    3. its prompt is prefilled in chunks beside the others' windows; with the last chunk comes its
       own first window, which brings its first token and drafts
    4. each step verifies its drafts, commits what stands and drafts again
    5. the host reads the step's result (one step late on a GPU), finds stop strings, hands out the
       text
    6. it ends: by a stop, its limit, `abort`, or its deadline; its slot is free, its full pages
       stay cached
    7. when pages run out, the last one in the order gives its own up, waits, and is prefilled again
    8. `check` finds every slot and page accounted for

Nothing here looks at a tensor's value before `read`, but for steps with a guided request; see
`GuidedRows`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch

from idlm.decoding.plan import Plan
from idlm.engine.intake import Intake
from idlm.engine.logprobs import add_prompt_logprobs, logprob_entries
from idlm.engine.metrics import Metrics
from idlm.engine.pages import PagePool
from idlm.engine.planner import Planner
from idlm.engine.prefill import Chunk
from idlm.engine.request import Logprob, Request, Result, Update
from idlm.engine.runner import Launched, Runner
from idlm.engine.scheduler import Scheduler, longest
from idlm.engine.step import Kind
from idlm.params import SamplingParams

WARM_UP_SECONDS = 5.0
MOST_STEPS = 4
"""Decode steps' worth of prompts that a step may take where many wait for their first token and few
decode."""
PREFILL_ALONE = 2048
"""Prompt tokens of one step while nobody decodes."""
PREFILL_LATE = 512
"""Prompt tokens beside running requests where results come late: a launch's time tells nothing of
the device's."""


@dataclass
class _Flight:
    """A launched step and whom it concerns, in the order of its rows."""

    launched: Launched
    requests: list[Request]
    tokens: int
    prompts: list[tuple[Request, Chunk]]


class Engine:
    """The loop.

    Args:
        runner: the device side.
        planner: says which plan to run.
        pages, page_size: of the runner's cache.
        slots: the most requests at once.
        late: steps launched before the results of one are read: 1 hides the host behind a GPU, 0
            suits a CPU.
        prefill_tokens: prompt tokens a step may add while others decode; None: about a step's
            worth.
        adapters: names of the adapters, by index.
        root: see `Scheduler`.
    """

    def __init__(
        self,
        runner: Runner,
        planner: Planner,
        pages: int,
        page_size: int,
        slots: int,
        late: int = 0,
        prefill_tokens: int | None = None,
        adapters: Sequence[str] = (),
        root: bytes = b"",
    ) -> None:
        self.runner, self.planner, self.late = runner, planner, late
        self.scheduler = Scheduler(slots, PagePool(pages, page_size), root)
        self.metrics = Metrics()
        self.intake = Intake(runner.idlm, runner.depth, self.scheduler.pool, adapters)
        self._prefill_tokens = prefill_tokens
        self._requests: dict[str, Request] = {}
        self._flights: deque[_Flight] = deque()
        self._ended: list[Update] = []

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._requests or self._flights or self._ended)

    def add(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        seed: int,
        adapter: str | None = None,
        drafting: bool = True,
        priority: int = 0,
        timeout: float | None = None,
        salt: bytes = b"",
    ) -> str:
        """Queue a request for one sample; returns its id. The arguments are those of
        `Intake.request`.

        Raises:
            InputError: it could never run here.
        """
        request = self.intake.request(
            prompt, params, seed, adapter, drafting, priority, timeout, salt
        )
        self._requests[request.id] = request
        self.scheduler.wait(request)
        return request.id

    def result(self, request_id: str) -> Result:
        """What a request that is still here has come to; it grows in place, and is the result in
        the end."""
        return self._requests[request_id].result

    @torch.inference_mode()
    def abort(self, request_id: str) -> bool:
        """End a request in whatever state it is; False where it is not known (any more)."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        self._end(request, "abort")
        return True

    @torch.inference_mode()  # once for all that it calls: entering it costs more than most of that
    def step(self) -> list[Update]:
        """Admit, launch one step, and return what the steps before have brought."""
        started = perf_counter()
        self._expire()
        self._admit()
        earlier = len(self._flights)
        worked = self._launch()
        keep = max(0, len(self._flights) - earlier) if self.late else 0
        while len(self._flights) > keep:
            self._absorb(self._flights.popleft())
        self._ended, updates = [], self._ended
        if worked:
            self.metrics.count_step(perf_counter() - started)
        return updates

    def run(self) -> Iterable[Update]:
        """Step until nothing is left."""
        while self.busy:
            yield from self.step()

    def warm_up(self, seconds: float = WARM_UP_SECONDS) -> None:
        """Prepare the steps that most requests need, in bounded time; a server does so before it is
        ready."""
        self.runner.warm_up(self.planner.plans, seconds)

    @torch.inference_mode()
    def drain(self) -> None:
        """Read what is under way, so that host and device agree."""
        while self._flights:
            self._absorb(self._flights.popleft())

    def check(self) -> None:
        """Check that no slot and no page is lost; see `Scheduler.check`."""
        self.scheduler.check()

    def _expire(self) -> None:
        now = perf_counter()
        for request in list(self._requests.values()):
            if request.deadline is not None and now >= request.deadline:
                self._end(request, "timeout")

    def _admit(self) -> None:
        while (request := self.scheduler.admit()) is not None:
            assert request.slot is not None  # noqa: S101
            self.runner.seat(
                request.slot,
                request.prompt,
                request.result.token_ids,
                request.params,
                request.result.seed,
                request.limit,
                sorted(request.stop_ids),
                request.adapter,
                request.drafting,
                request.pages,
            )

    def _budget(self) -> int:
        """Prompt tokens this step may prefill; more where most wait, or the first to decode would
        hold them all up."""
        decoding, prefilling = len(self.scheduler.decoding), len(self.scheduler.prefilling)
        if not decoding:
            return PREFILL_ALONE
        if self._prefill_tokens is not None:
            return self._prefill_tokens
        worth = PREFILL_LATE if self.late else self.metrics.prefill_budget()
        return min(worth * min(max(1, prefilling // decoding), MOST_STEPS), PREFILL_ALONE)

    def _launch(self) -> bool:
        """One forward: a window for whoever decodes, chunks for whoever is still to."""
        if any(request.matcher for request in self.scheduler.running):
            self.drain()  # a guide has to know all that is committed
        running = self.scheduler.decoding or self.scheduler.prefilling
        if not running:
            return False
        plan = self.planner.choose(len(running), any(request.drafting for request in running))
        self._grow(plan)
        work = self.scheduler.chunks(self._budget())
        requests = list(self.scheduler.decoding)
        if not requests and not work:
            return False
        started = perf_counter()
        slots = [request.slot for request in requests if request.slot is not None]
        tokens = longest(requests) + self._ahead(plan) if requests else 1
        matchers = [request.matcher for request in requests]
        chunks = [chunk for _, chunk in work]
        launched = self.runner.step(self._kind(plan), slots, tokens, chunks, matchers)
        prompt_tokens, seconds = (
            sum(len(chunk.tokens) for chunk in chunks),
            perf_counter() - started,
        )
        self.metrics.count_launch(plan, len(slots), prompt_tokens, seconds)
        if not chunks and not any(matchers) and self.runner.steady:
            self.planner.observe_cost(len(slots), plan, seconds)
        self._flights.append(_Flight(launched, requests, plan.stride if requests else 0, work))
        return True

    def _ahead(self, plan: Plan) -> int:
        """Tokens by which the device may be past what the host knows, and the drafts of the step to
        come."""
        return sum(flight.tokens for flight in self._flights) + plan.drafts

    def _grow(self, plan: Plan) -> None:
        """Pages for the step to come; where they run out, someone gives theirs up."""
        ahead, entries = self._ahead(plan), []
        lacking = [
            one for one in self.scheduler.decoding if self.scheduler.lacks(one, one.length + ahead)
        ]
        for request in sorted(lacking, key=lambda one: one.order):
            while request.slot is not None and not request.finished:
                fresh = self.scheduler.grow(request, request.length + self._ahead(plan))
                if fresh is not None:
                    entries += fresh
                    break
                self._preempt()
        if entries:
            seated = {request.slot for request in self.scheduler.running}
            self.runner.map_pages([entry for entry in entries if entry[0] in seated])

    def _preempt(self) -> None:
        """Take the last one's pages; first what is under way is read: it may bring the end of
        somebody."""
        if self._flights:
            self.drain()
            return
        slot = self.scheduler.preempt(self.scheduler.victim())
        if slot is not None:
            self.runner.clear(slot)
        self.metrics.preemptions += 1

    def _kind(self, plan: Plan) -> Kind:
        wanted = [
            r.params.logprobs for r in self.scheduler.running if r.params.logprobs is not None
        ]
        return Kind(plan, self.runner.settings.features, max(wanted) if wanted else None)

    def _absorb(self, flight: _Flight) -> None:
        """Read a step's result and give each request its part."""
        started = perf_counter()
        outcome = flight.launched.read()
        self.metrics.device_seconds += perf_counter() - started
        if outcome.prompt is not None:
            add_prompt_logprobs(self.runner.idlm, flight.prompts, outcome.prompt)
        reached, accepted = [0] * self.runner.depth, [0] * self.runner.depth
        for row, (request, packed) in enumerate(
            zip(flight.requests, outcome.packed.tolist(), strict=False)
        ):
            *tokens, number, drafted, stood, _ = packed
            if number == 0 or request.finished or request.slot is None:
                continue
            for depth in range(min(drafted, stood + 1)):
                reached[depth] += 1
                accepted[depth] += depth < stood
            chances = logprob_entries(outcome, row, request) if outcome.logprobs else []
            self._deliver(request, tokens[:number], drafted, stood, chances)
        self.planner.observe(reached, accepted)

    def _deliver(
        self,
        request: Request,
        tokens: list[int],
        drafted: int,
        accepted: int,
        chances: list[dict[int, Logprob]],
    ) -> None:
        kept, text = request.extend(tokens, drafted, accepted)
        self.metrics.tokens += len(kept)
        if request.result.logprobs is not None:
            request.result.logprobs += chances[: len(kept)]
        if request.complete:
            self._end(request, None, kept, text)
        else:
            self._report(request, kept, text)

    def _end(
        self, request: Request, reason: str | None, tokens: Sequence[int] = (), text: str = ""
    ) -> None:
        """Free what it holds and report it."""
        slot = self.scheduler.leave(request)
        if slot is not None:
            self.runner.clear(slot)
        rest = request.finish(reason)
        del self._requests[request.id]
        self._report(request, tokens, text + rest, request.result)

    def _report(
        self, request: Request, tokens: Sequence[int], text: str, result: Result | None = None
    ) -> None:
        sources = request.result.sources
        self._ended.append(
            Update(request.id, list(tokens), text, result, sources[len(sources) - len(tokens) :])
        )
