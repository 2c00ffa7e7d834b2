"""`Engine`: runs many requests in one batch, step by step.

The life of a request:
    1. `add` queues it. The admission refuses requests that can never run.
    2. The scheduler gives it a slot and pages. Pages of the prefix cache are used first.
    3. Its prompt is prefilled in chunks, beside the windows of other requests. The step of the last
       chunk also runs its first window, which commits its first token and makes drafts.
    4. Each step verifies its drafts, commits tokens and makes new drafts.
    5. The host reads the result (one step late on a GPU), finds stop strings and returns text.
    6. It ends at a stop, at its limit, by `abort` or at its deadline. Its slot becomes free; its
       full pages stay cached.
    7. If pages run out, the last request in the order is pre-empted: it loses its pages, waits, and
       is prefilled again later.
    8. `check` verifies that no slot and no page is lost.

The host reads no tensor of a step before `read`, except in steps with a guided request; see
`GuidedRows`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch

from idlm.config import EngineConfig
from idlm.decoding.plan import AR, Plan
from idlm.engine.adapters import Adapters
from idlm.engine.admission import Admission
from idlm.engine.budget import PrefillBudget
from idlm.engine.guide import Constraint
from idlm.engine.logprobs import add_prompt_logprobs, logprob_entries
from idlm.engine.lookup_planner import LookupPlanner
from idlm.engine.metrics import Metrics
from idlm.engine.pages import PagePool
from idlm.engine.planner import Planner
from idlm.engine.prefill import Chunk
from idlm.engine.request import USUAL, Logprob, Request, Result, Terms, Update
from idlm.engine.results import SlotResult, Tally
from idlm.engine.runner import PendingStep, Runner
from idlm.engine.scheduler import Scheduler, longest
from idlm.engine.step import StepKey
from idlm.engine.windows import recorded, wanted
from idlm.models.more_adapters import Loaded
from idlm.params import SamplingParams

WARM_UP_SECONDS = 5.0
RECORD_SECONDS = 0.5
"""For steps that are recorded again because an adapter came or went: all requests wait for it."""


@dataclass
class InFlight:
    """A launched step.

    Attributes:
        requests: the requests that decode, in the order of the result's rows.
        prompts: the chunks that the step prefills.
        after: the plan of the step before.
    """

    pending: PendingStep
    plan: Plan
    requests: list[Request]
    prompts: list[tuple[Request, Chunk]]
    after: Plan

    @property
    def tokens(self) -> int:
        """The most tokens that the step commits for each request."""
        return self.plan.stride if self.requests else 0


class Engine:
    """The engine loop: `add` requests, then call `step` while `busy`.

    Args:
        runner: runs steps on the device.
        planner: chooses the plan of each step.
        adapters: the names of the adapters, by index; None: an index without adapter.
        window: the largest sliding window if all layers have one; see `Scheduler`.
        lookups: chooses the steps that verify lookup drafts, if there is a choice.
    """

    def __init__(
        self,
        runner: Runner,
        planner: Planner,
        config: EngineConfig,
        adapters: Sequence[str | None] = (),
        window: int | None = None,
        lookups: LookupPlanner | None = None,
    ) -> None:
        cache, idlm = runner.model_step.cache, runner.idlm
        late = int(idlm.device.type == "cuda")
        self.runner, self.planner, self.config = runner, planner, config
        self.lookups = lookups
        self.lookahead = late if config.lookahead is None else config.lookahead
        pool = PagePool(len(cache.pages[0][0]), cache.page_size)
        root = f"{idlm.name} {idlm.dtype}".encode()
        self.scheduler = Scheduler(config.max_num_seqs, pool, root, window)
        self.metrics = Metrics()
        self.budget = PrefillBudget(config.prefill_tokens, clocked=not self.lookahead)
        self._raw = config.logprobs_mode == "raw_logprobs"
        self.adapters = Adapters(idlm, adapters)
        self.admission = Admission(idlm, runner.depth, pool, self.adapters)
        self._requests: dict[str, Request] = {}
        self._in_flight: deque[InFlight] = deque()
        self._last = AR  # the plan of the last step
        self._updates: list[Update] = []

    @property
    def busy(self) -> bool:
        """Whether there are requests, steps in flight or updates that were not returned yet."""
        return bool(self._requests or self._in_flight or self._updates)

    def add(
        self, prompt: Sequence[int], params: SamplingParams, seed: int, terms: Terms = USUAL
    ) -> str:
        """Queue a request for one sample and return its id; see `Admission.request`.

        Raises:
            InputError: the engine can never run the request.
        """
        request = self.admission.request(prompt, params, seed, terms)
        self._requests[request.id] = request
        self.scheduler.wait(request)
        return request.id

    def result(self, request_id: str) -> Result:
        """The result of a request that has not ended. It grows in place and becomes the final
        result.

        Raises:
            KeyError: the request has ended, or never existed.
        """
        return self._requests[request_id].result

    @torch.inference_mode()
    def abort(self, request_id: str) -> bool:
        """End a request, whether it waits or runs. False if it has ended already or never
        existed."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        self._end(request, "abort")
        return True

    @torch.inference_mode()  # once for all calls in it: entering the mode is slow
    def step(self) -> list[Update]:
        """Admit requests, launch one step, and return the updates of the results read in this call.

        With `lookahead` these are the results of the step before. The host processes them while
        the device runs the new step.
        """
        started = perf_counter()
        self._expire()
        if self.adapters.retired:
            self._release()
        self._admit()
        before = len(self._in_flight)
        worked = self._launch()
        launched = len(self._in_flight) - before
        keep = max(0, launched) if self.lookahead else 0
        while len(self._in_flight) > keep:
            self._absorb(self._in_flight.popleft())
        self._updates, updates = [], self._updates
        if worked:
            self.metrics.count_step(perf_counter() - started)
        return updates

    def run(self) -> Iterable[Update]:
        """Call `step` until the engine is not busy; yield every update."""
        while self.busy:
            yield from self.step()

    def warm_up(self, seconds: float = WARM_UP_SECONDS) -> None:
        """Record the steps that most requests need, within about `seconds`. A server does so before
        it reports that it is ready."""
        most, lookups = self.config.max_num_seqs, self.lookups.plans if self.lookups else []
        self.runner.warm_up([*self.planner.likely(most), *lookups], seconds)

    def load_adapter(self, name: str, adapter: Loaded) -> None:
        """Attach an adapter that requests can then name. Running requests go on, and cached pages
        stay, since they are the base's. The engine must have been built with `changing`.

        Raises:
            InputError: it cannot be attached; nothing has changed.
        """
        self.drain()
        self.adapters.add(name, adapter, self.runner.model_step.products)
        self._model_changed()

    def unload_adapter(self, name: str) -> None:
        """Take an adapter's name away. Requests that run or wait with it go on.

        Raises:
            InputError: there is no such adapter.
        """
        self.adapters.remove(name)
        self._release()

    def _release(self) -> None:
        """Detach the adapters without a name that no request uses any more."""
        unused = self.adapters.retired - {one.adapter for one in self._requests.values()}
        if unused:
            self.drain()
            for index in unused:
                self.adapters.release(index)
            self._model_changed()

    def _model_changed(self) -> None:
        self.runner.forget()
        self.warm_up(RECORD_SECONDS)

    @torch.inference_mode()
    def drain(self) -> None:
        """Read the results of all steps in flight, so that host and device agree."""
        while self._in_flight:
            self._absorb(self._in_flight.popleft())

    def check(self) -> None:
        """Check that no slot and no page is lost; errors as in `Scheduler.check`."""
        self.scheduler.check()

    def _expire(self) -> None:
        now = perf_counter()
        for request in list(self._requests.values()):
            if request.deadline is not None and now >= request.deadline:
                self._end(request, "timeout")

    def _admit(self) -> None:
        while (request := self.scheduler.admit()) is not None:
            self.runner.seat(request)

    def _launch(self) -> bool:
        """Launch one step: decode windows and prefill chunks. False if there is no work."""
        scheduler = self.scheduler
        if any(map(self._constraint, scheduler.running)):
            self.drain()  # a guide needs all committed tokens
        running = scheduler.decoding or scheduler.prefilling
        if not running:
            return False
        plan = self._plan(running)
        self._grow(plan)
        budget = self.budget.tokens(len(scheduler.decoding), len(scheduler.prefilling))
        prompts = scheduler.chunks(budget)
        requests = list(scheduler.decoding)
        if not requests and not prompts:
            return False
        started, used = perf_counter(), self.runner.clock()
        pending = self._run(plan, requests, [chunk for _, chunk in prompts])
        self.metrics.device_seconds += perf_counter() - started
        self._count(plan, requests, prompts, self.runner.clock() - used)
        self._in_flight.append(InFlight(pending, plan, requests, prompts, self._last))
        self._last = plan
        return True

    def _plan(self, running: list[Request]) -> Plan:
        masks = self.planner.widest.masks
        drafting = sum(one.drafting or (one.looking and not masks) for one in running)
        prefilling = bool(self.scheduler.prefilling)  # then the planner learns nothing
        ready = lambda plan: not prefilling and self.runner.ready(self._key(plan))  # noqa: E731
        plan = self.planner.choose(len(running), drafting, ready)
        return self.lookups.choose(plan, self.scheduler.decoding) if self.lookups else plan

    def _run(self, plan: Plan, requests: list[Request], chunks: list[Chunk]) -> PendingStep:
        slots = [request.slot for request in requests if request.slot is not None]
        tokens = longest(requests) + self._ahead(plan) if requests else 1
        matchers = [self._constraint(request) for request in requests]
        key, windows = self._key(plan), wanted(requests)
        return self.runner.step(key, slots, tokens, chunks, matchers, windows)

    def _constraint(self, request: Request) -> Constraint | None:
        """The request's matcher, unless it cannot restrict a token or draft of the next step: steps
        with a matcher are slower."""
        ahead = sum(step.tokens for step in self._in_flight) + 2 * (self.runner.depth + 1)
        matcher = request.matcher
        return matcher if matcher is not None and matcher.restricts(ahead) else None

    def _count(
        self,
        plan: Plan,
        requests: list[Request],
        prompts: list[tuple[Request, Chunk]],
        seconds: float,
    ) -> None:
        """Count a step in the metrics, and give its time to the budget and the planner."""
        batch, prompt_tokens = len(requests), sum(len(chunk.tokens) for _, chunk in prompts)
        self.metrics.count_launch(plan, batch, prompt_tokens)
        self.budget.observe(plan, batch, prompt_tokens, seconds)
        guided = any(map(self._constraint, requests))
        if not prompts and not guided and self.runner.steady:
            self.planner.observe_cost(batch, plan, seconds)
            if self.lookups is not None:
                self.lookups.observe_cost(batch, plan, seconds)

    def _key(self, plan: Plan) -> StepKey:
        params = [request.params.logprobs for request in self.scheduler.running]
        counts = [count for count in params if count is not None]
        most, features = max(counts) if counts else None, self.runner.settings.features
        return StepKey(plan, features, most, self._raw and most is not None)

    def _ahead(self, plan: Plan) -> int:
        """The most tokens that steps in flight may commit, plus the drafts of the next step."""
        return sum(step.tokens for step in self._in_flight) + plan.drafts

    def _grow(self, plan: Plan) -> None:
        """Free the pages that no later step reads, and give decoding requests those for the next
        step. If pages run out, pre-empt the last request in the order."""
        scheduler, ahead = self.scheduler, self._ahead(plan)
        entries = [entry for request in scheduler.running for entry in scheduler.trim(request)]
        lacking = [
            request
            for request in scheduler.decoding
            if scheduler.lacks(request, request.length + ahead)
        ]
        for request in sorted(lacking, key=lambda request: request.order):
            while request.slot is not None and not request.finished:
                fresh = scheduler.grow(request, request.length + self._ahead(plan))
                if fresh is not None:
                    entries += fresh
                    break
                self._preempt()
        if entries:
            seated = {request.slot for request in scheduler.running}
            self.runner.map_pages([entry for entry in entries if entry[0] in seated])

    def _preempt(self) -> None:
        """Pre-empt the last request in the order, or read the steps in flight if there are any: a
        request that ends in one of them frees its pages, so that none need be pre-empted."""
        if self._in_flight:
            self.drain()
            return
        slot = self.scheduler.preempt(self.scheduler.victim())
        if slot is not None:
            self.runner.clear(slot)
        self.metrics.preemptions += 1

    def _absorb(self, step: InFlight) -> None:
        """Wait for a step's result and append its tokens to the requests."""
        started = perf_counter()
        result = step.pending.read()
        self.metrics.device_seconds += perf_counter() - started
        if result.prompt is not None:
            add_prompt_logprobs(self.runner.idlm, step.prompts, result.prompt, self._raw)
        tally = Tally(self.planner.widest.drafts)
        drafts = None if step.pending.drafts is None else step.pending.drafts.tolist()
        for row, (request, slot) in enumerate(zip(step.requests, result.slots(), strict=False)):
            done = request.finished or request.slot is None
            if done or (slot.committed == 0 and not slot.stuck):
                continue
            if request.matched and self.lookups is not None:
                self.lookups.observe(request, slot)
            elif not request.matched:
                tally.add(slot, request.drafting)
            request.matched, request.guess = slot.matched, slot.guess
            if request.result.windows is not None and drafts is not None:
                request.result.windows.append(recorded(request, step.plan, slot, drafts[row]))
            logprobs = logprob_entries(result, row, request) if result.logprobs else []
            self._deliver(request, slot, logprobs)
        self.planner.observe(tally.reached, tally.accepted)
        if step.after.masks and step.plan.masks:
            self.planner.observe_tokens(step.plan, tally.windows, tally.tokens)

    def _deliver(
        self, request: Request, slot: SlotResult, logprobs: list[dict[int, Logprob]]
    ) -> None:
        kept, text = request.extend(slot.tokens[: slot.committed], slot.drafted, slot.accepted)
        if slot.stuck and not request.complete:
            request.fail()
        self.metrics.tokens += len(kept)
        if request.result.logprobs is not None:
            request.result.logprobs += logprobs[: len(kept)]
        if request.complete:
            self._end(request, None, kept, text)
        else:
            self._report(request, kept, text)

    def _end(
        self, request: Request, reason: str | None, tokens: Sequence[int] = (), text: str = ""
    ) -> None:
        """Free the request's slot and pages, and report its result."""
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
        self._updates.append(
            Update(request.id, list(tokens), text, result, sources[len(sources) - len(tokens) :])
        )
