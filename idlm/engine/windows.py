"""`recorded`: the record of one window, made on the host from what its step read and returned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from idlm.decoding.plan import Plan
from idlm.decoding.window import outcomes
from idlm.engine.request import Request, WindowRecord
from idlm.engine.results import SlotResult


def wanted(requests: Iterable[Request]) -> bool:
    """Whether any request asks for its windows."""
    return any(request.result.windows is not None for request in requests)


def recorded(request: Request, plan: Plan, slot: SlotResult, drafts: Sequence[int]) -> WindowRecord:
    """The window that gave `slot`, before its tokens are appended to the request.

    `drafts` are those in the request's slot when the step began, the valid ones first. A request
    that does not draft shares a step's layout, but its MASK rows are not used and not shown.
    """
    output = request.result.token_ids
    masked = plan.drafts if request.drafting and plan.masks else 0
    return WindowRecord(
        position=request.length - 1,
        plan=plan.name,
        width=plan.width,
        pending=output[-1] if output else request.prompt[-1],
        drafts=list(drafts[: slot.drafted]),
        accepted=slot.accepted,
        outcomes=list(outcomes(plan.branches, slot.drafted)) if masked else [],
        masks=masked,
    )
