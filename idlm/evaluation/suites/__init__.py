"""The suites of `idlm eval`, as data: where items come from, what is asked, what grades it."""

from __future__ import annotations

from idlm.errors import InputError
from idlm.evaluation.suites.choice import CHOICE
from idlm.evaluation.suites.code import CODE
from idlm.evaluation.suites.instructions import INSTRUCTIONS
from idlm.evaluation.suites.maths import MATHS
from idlm.evaluation.suites.suite import Suite

SUITES: dict[str, Suite] = {suite.name: suite for suite in (*CHOICE, *MATHS, *CODE, *INSTRUCTIONS)}
"""By name, in the order of the paper's table."""


def named(names: list[str]) -> list[Suite]:
    """The suites of these names, once each.

    Raises:
        InputError: a name is unknown.
    """
    for name in names:
        if name not in SUITES:
            raise InputError(f"suite {name!r} is unknown; use {', '.join(SUITES)}")
    return [SUITES[name] for name in dict.fromkeys(names)]
