"""`SamplingParams`: the settings of a request. There are no global settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from idlm.errors import InputError
from idlm.inputs import check_text, plain

VERIFICATIONS = ("coupled", "ratio", "relaxed")
SEED_LIMIT = 2**63
MOST_SAMPLES = 64
MOST_LOGPROBS = 20
GUIDES = ("json_object", "json_schema", "regex", "choice", "grammar")
MOST_GUIDE = 2**16
"""The most characters of a guide's text."""


@dataclass(frozen=True)
class Guide:
    """A format that the whole output must match.

    Attributes:
        kind: "json_object" (any JSON object; without text), "json_schema", "regex", "choice" or
            "grammar" (Lark or GBNF).
        text: the schema as JSON, the regular expression, the choices as a JSON list of strings, or
            the grammar.
        name: what errors call it, such as a field of a request.
    """

    kind: str
    text: str = ""
    name: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if self.kind not in GUIDES:
            raise InputError(f"guide kind {self.kind!r} is unknown; use one of {', '.join(GUIDES)}")
        if not isinstance(self.text, str):
            raise InputError(
                f"the text of a guide is {type(self.text).__name__}; "
                "give a string, a schema as JSON text"
            )
        check_text(self.text, "the text of a guide")
        if len(self.text) > MOST_GUIDE:
            raise InputError(
                f"a guide of {len(self.text)} characters is too long; use at most {MOST_GUIDE}"
            )
        if (self.kind == "json_object") == bool(self.text):
            raise InputError(
                f"guide {self.kind!r} with text {self.text[:40]!r}; "
                "'json_object' has none, the others need it"
            )


@dataclass(frozen=True)
class Thinking:
    """Thoughts that a model writes before its answer, between two tokens.

    Attributes:
        start, end: the ids of these tokens.
        open: the prompt ends within the thoughts. Otherwise the output has thoughts if `start` is
            its first token.
        budget: the most tokens of the thoughts; `end` comes after them. None: no limit.
    """

    start: int
    end: int
    open: bool = False
    budget: int | None = None

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            _integer(f"thinking.{name}", getattr(self, name), 0, 2**31)
        if self.budget is not None:
            _integer("thinking.budget", self.budget, 0, 2**31)

    @property
    def first(self) -> int | None:
        """The state at the start of the output: see `after`."""
        return 0 if self.open else -1

    def after(self, state: int | None, token: int) -> int | None:
        """The state after one more token: the number of tokens of the thoughts so far, -1 before
        the first token, None in the answer."""
        if state == -1:
            return 0 if token == self.start else None
        return None if state is None or token == self.end else state + 1


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of a request are chosen, and when it ends.

    A field that is None has its default, and NumPy's numbers are taken, as in vLLM.

    Attributes:
        n: the number of samples. Sample i has seed + i: it equals the output of a request with n=1
            and that seed.
        max_tokens: the most tokens of the output.
        min_tokens: the end token and `stop_token_ids` are banned in the first `min_tokens` tokens,
            and stop strings are not searched in them.
        temperature: 0 is greedy.
        top_k: keep the k most likely tokens; 0 or -1 keeps all.
        top_p: keep the fewest most likely tokens whose total probability reaches this.
        min_p: drop tokens whose probability is below this share of the largest.
        repetition_penalty: divides positive logits, and multiplies negative ones, of tokens in the
            prompt or the output.
        presence_penalty: subtracted once from the logit of each token in the output.
        frequency_penalty: subtracted from a token's logit for each time it is in the output.
        logit_bias: by token id, added to the logit.
        banned_tokens: ids that are never chosen.
        seed: of the request's noise, 0 <= seed < 2**63; None draws one, which the result reports.
        stop_token_ids: ids that end the output, in addition to the model's end token.
        stop: a string, or several; the output ends when its text contains one.
        include_stop_str_in_output: keep the stop string at the end of the text.
        ignore_eos: do not stop at the model's end token. A `guide` still ends the output.
        skip_special_tokens: leave special tokens out of the text.
        detokenize: produce text; without it the result has tokens only, and `stop` is refused.
        logprobs: report, for each output token, the log-probabilities of that token and of so many
            most likely ones. None: no log-probabilities.
        prompt_logprobs: the same for the tokens of the prompt.
        verification: "coupled" and "ratio" are exact; "relaxed" is approximate and needs `tau`.
        tau: relaxed only: also accept a draft whose probability is at least tau times the largest.
        guide: the format of the output. The output ends when it is complete, or before that by
            `max_tokens` or a stop.
        thinking: the thoughts before the answer. The guide begins after them; with a guide they do
            not end the output.
    """

    n: int = 1
    max_tokens: int = 256
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    banned_tokens: tuple[int, ...] = ()
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    stop: str | Sequence[str] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    detokenize: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    verification: str = "coupled"
    tau: float | None = None
    guide: Guide | None = None
    thinking: Thinking | None = None

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if value is None and one.default is not None:
                value = one.default_factory() if one.default is MISSING else one.default  # type: ignore[operator]
            object.__setattr__(self, one.name, plain(value))
        self._check_counts()
        self._check_numbers()
        self._check_tokens()
        self._check_text()
        self._check_guide()
        if self.verification not in VERIFICATIONS:
            raise InputError(
                f"verification {self.verification!r} is unknown; "
                f"use one of {', '.join(VERIFICATIONS)}"
            )
        if (self.tau is not None) != (self.verification == "relaxed"):
            raise InputError(
                f"tau={self.tau} with verification={self.verification!r}; "
                "tau goes with 'relaxed', and only with it"
            )

    def _check_counts(self) -> None:
        _integer("n", self.n, 1, MOST_SAMPLES + 1)
        _integer("max_tokens", self.max_tokens, 1, 2**31)
        _integer("min_tokens", self.min_tokens, 0, 2**31)
        if self.min_tokens > self.max_tokens:
            raise InputError(
                f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}; "
                "lower one or raise the other"
            )
        _integer("top_k", self.top_k, -1, 2**31)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, MOST_LOGPROBS + 1)
        if self.seed is not None:
            _integer("seed", self.seed, 0, SEED_LIMIT)
            _integer("seed + n - 1", self.seed + self.n - 1, 0, SEED_LIMIT)

    def _check_numbers(self) -> None:
        _number("temperature", self.temperature, 0.0, 1e4)
        _number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 1e4, open_low=True)
        _number("presence_penalty", self.presence_penalty, -1e4, 1e4)
        _number("frequency_penalty", self.frequency_penalty, -1e4, 1e4)
        if self.tau is not None:
            _number("tau", self.tau, 0.0, 1.0, open_low=True)

    def _check_tokens(self) -> None:
        if not isinstance(self.logit_bias, Mapping):
            raise InputError(
                f"logit_bias={self.logit_bias!r} is not a mapping; use {{token id: bias}}"
            )
        biases = {plain(token): plain(bias) for token, bias in self.logit_bias.items()}
        object.__setattr__(self, "logit_bias", biases)
        for token, bias in biases.items():
            _integer("logit_bias token", token, 0, 2**31)
            _number(f"logit_bias[{token}]", bias, -1e4, 1e4)
        for name in ("banned_tokens", "stop_token_ids"):
            value = getattr(self, name)
            if isinstance(value, str) or not hasattr(value, "__iter__"):
                raise InputError(
                    f"{name}={value!r} is not a sequence of token ids; use for example [2, 5]"
                )
            object.__setattr__(self, name, tuple(map(plain, value)))
            for token in getattr(self, name):
                _integer(f"{name} entry", token, 0, 2**31)

    def _check_text(self) -> None:
        if not isinstance(self.stop, str) and not hasattr(self.stop, "__iter__"):
            raise InputError(f"stop={self.stop!r} is not text; use a string, or a list of strings")
        object.__setattr__(
            self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        )
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise InputError(
                    f"stop entry {text!r} is not a non-empty string; use text, or stop=() for none"
                )
            check_text(text, "stop")
        for name in (
            "ignore_eos",
            "skip_special_tokens",
            "include_stop_str_in_output",
            "detokenize",
        ):
            if not isinstance(getattr(self, name), bool):
                raise InputError(
                    f"{name}={getattr(self, name)!r} is neither True nor False; use one of them"
                )
        if self.stop and not self.detokenize:
            raise InputError(
                f"stop={self.stop!r} with detokenize=False, which makes no text; use stop_token_ids"
            )

    def _check_guide(self) -> None:
        if self.guide is not None and not isinstance(self.guide, Guide):
            raise InputError(
                f"guide={self.guide!r} is not a Guide; use for example Guide('json_object')"
            )
        if self.thinking is not None and not isinstance(self.thinking, Thinking):
            raise InputError(
                f"thinking={self.thinking!r} is not a Thinking; use for example Thinking(7, 8)"
            )
        if self.guide is not None and self.min_tokens:
            raise InputError(
                f"min_tokens={self.min_tokens} with a guide, "
                "which alone says where its output may end; put the length "
                "into the guide, for example as minLength or minItems"
            )

    @property
    def greedy(self) -> bool:
        """Whether the law is a point mass: temperature 0."""
        return self.temperature == 0

    @property
    def penalised(self) -> bool:
        """Whether a penalty is on, so that the law depends on the tokens before."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Check the token ids against the model.

        Raises:
            InputError: an id of `logit_bias`, `banned_tokens` or `stop_token_ids` is not below
                `vocab_size`.
        """
        named = {n: getattr(self, n) for n in ("logit_bias", "banned_tokens", "stop_token_ids")}
        if self.thinking is not None:
            named["thinking"] = (self.thinking.start, self.thinking.end)
        for name, tokens in named.items():
            outside = [token for token in tokens if token >= vocab_size]
            if outside:
                raise InputError(
                    f"{name} names token {outside[0]}; the model's ids are 0..{vocab_size - 1}"
                )


def with_defaults(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> SamplingParams:
    """The fields `given`, and a model's `defaults` for the others.

    A default of `min_tokens` gives way to a `max_tokens` or a guide that it contradicts.

    Raises:
        InputError: a value is out of range.
    """
    fields = {**defaults, **given}
    if "min_tokens" in defaults and "min_tokens" not in given:
        if "max_tokens" in fields:
            fields["min_tokens"] = min(fields["min_tokens"], fields["max_tokens"])
        if fields.get("guide") is not None:
            del fields["min_tokens"]
    return SamplingParams(**fields)


def _integer(name: str, value: object, low: int, below: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{name}={value!r} is not an integer; give a whole number from {low}")
    if not low <= value < below:
        raise InputError(f"{name}={value} is out of range; use {low} <= {name} < {below}")


def _number(name: str, value: object, low: float, high: float, open_low: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{name}={value!r} is not a number; give one from {low} to {high}")
    if not math.isfinite(value) or not low <= value <= high or (open_low and value == low):
        raise InputError(
            f"{name}={value} is out of range; "
            f"use {low} {'<' if open_low else '<='} {name} <= {high}"
        )
