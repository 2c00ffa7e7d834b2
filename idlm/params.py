"""`SamplingParams`: the settings of a request. There are no global settings."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

from idlm.errors import InputError
from idlm.guides import Guide as Guide
from idlm.guides import Thinking as Thinking
from idlm.inputs import check_text, plain

VERIFICATIONS = ("coupled", "ratio", "relaxed")
SEED_LIMIT = 2**63
MOST_SAMPLES = 1024
MOST_LOGPROBS = 20
MOST_BAD_WORDS = 256
LONGEST_BAD_WORD = 16
"""Tokens of a bad word."""
SHOWN = 8
"""Wrong ids that an error names."""


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
        allowed_token_ids: the only ids that are chosen; None: all. The model's end token has to be
            among them if it shall end the output.
        bad_words: texts, or sequences of token ids, that are not generated: where the output ends
            with all of a sequence's ids but the last, the last is banned. A text stands for its own
            ids and for those that it has after a space. The same text spelled by other tokens is
            not found, nor one that begins in the prompt.
        seed: of the request's noise, -2**63 <= seed < 2**63; None draws one, which the result
            reports.
        stop_token_ids: ids that end the output, in addition to the model's end token.
        stop: a string, or several; the output ends when its text contains one.
        include_stop_str_in_output: keep the stop string at the end of the text.
        ignore_eos: do not stop at the model's end token. A `guide` still ends the output.
        skip_special_tokens: leave special tokens out of the text.
        detokenize: produce text; without it the result has tokens only, and `stop` is refused.
        logprobs: report, for each output token, the log-probabilities of that token and of so many
            most likely ones; `EngineConfig.logprobs_mode` says of which law. None: no
            log-probabilities.
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
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: Sequence[str | Sequence[int]] = ()
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
                f"use one of {', '.join(VERIFICATIONS)}",
                "verification",
            )
        if (self.tau is not None) != (self.verification == "relaxed"):
            raise InputError(
                f"tau={self.tau} with verification={self.verification!r}; "
                "tau goes with 'relaxed', and only with it",
                "tau",
            )

    def _check_counts(self) -> None:
        _integer("n", self.n, 1, MOST_SAMPLES + 1)
        _integer("max_tokens", self.max_tokens, 1, 2**31)
        _integer("min_tokens", self.min_tokens, 0, 2**31)
        if self.min_tokens > self.max_tokens:
            raise InputError(
                f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}; "
                "lower one or raise the other",
                "min_tokens",
            )
        _integer("top_k", self.top_k, -1, 2**31)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, MOST_LOGPROBS + 1)
        if self.seed is not None:
            _integer("seed", self.seed, -SEED_LIMIT, SEED_LIMIT)
            _integer("seed + n - 1", self.seed + self.n - 1, -SEED_LIMIT, SEED_LIMIT, "seed")

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
                f"logit_bias={self.logit_bias!r} is not a mapping; use {{token id: bias}}",
                "logit_bias",
            )
        biases = {plain(token): plain(bias) for token, bias in self.logit_bias.items()}
        object.__setattr__(self, "logit_bias", biases)
        for token, bias in biases.items():
            _integer("logit_bias token", token, 0, 2**31, "logit_bias")
            _number(f"logit_bias[{token}]", bias, -1e4, 1e4, param="logit_bias")
        for name in ("banned_tokens", "stop_token_ids", "allowed_token_ids"):
            if getattr(self, name) is not None or name != "allowed_token_ids":
                object.__setattr__(self, name, _token_ids(name, getattr(self, name)))
        if self.allowed_token_ids == ():
            raise InputError(
                "allowed_token_ids is empty, which leaves no token; name some, or leave it out",
                "allowed_token_ids",
            )
        self._check_bad_words()

    def _check_bad_words(self) -> None:
        words = self.bad_words
        if isinstance(words, str) or not hasattr(words, "__iter__"):
            raise InputError(
                f"bad_words={words!r} is not a sequence; use for example ['word']", "bad_words"
            )
        words = tuple(
            word if isinstance(word, str) else _token_ids("bad_words", word) for word in words
        )
        object.__setattr__(self, "bad_words", words)
        for word in words:
            if isinstance(word, str):
                check_text(word, "bad_words")
            if not (word.strip() if isinstance(word, str) else word):
                raise InputError(
                    f"bad_words entry {word!r} is empty; give text, or token ids", "bad_words"
                )
            if not isinstance(word, str) and len(word) > LONGEST_BAD_WORD:
                raise InputError(
                    f"bad_words has a word of {len(word)} tokens; use at most {LONGEST_BAD_WORD}",
                    "bad_words",
                )
        if len(words) > MOST_BAD_WORDS:
            raise InputError(
                f"bad_words has {len(words)} token sequences; use at most {MOST_BAD_WORDS}",
                "bad_words",
            )

    def _check_text(self) -> None:
        if not isinstance(self.stop, str) and not hasattr(self.stop, "__iter__"):
            raise InputError(
                f"stop={self.stop!r} is not text; use a string, or a list of strings", "stop"
            )
        object.__setattr__(
            self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        )
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise InputError(
                    f"stop entry {text!r} is not a non-empty string; use text, or leave it out",
                    "stop",
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
                    f"{name}={getattr(self, name)!r} is neither True nor False; use one of them",
                    name,
                )
        if self.stop and not self.detokenize:
            raise InputError(
                f"stop={self.stop!r} with detokenize=False, which makes no text; "
                "use stop_token_ids",
                "stop",
            )

    def _check_guide(self) -> None:
        if self.guide is not None and not isinstance(self.guide, Guide):
            raise InputError(
                f"guide={self.guide!r} is not a Guide; use for example Guide('json_object')",
                "guide",
            )
        if self.thinking is not None and not isinstance(self.thinking, Thinking):
            raise InputError(
                f"thinking={self.thinking!r} is not a Thinking; use for example Thinking(7, 8)",
                "thinking",
            )
        if self.guide is not None and self.min_tokens:
            raise InputError(
                f"min_tokens={self.min_tokens} with a guide, "
                "which alone says where its output may end; put the length "
                "into the guide, for example as minLength or minItems",
                "min_tokens",
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

    @property
    def never(self) -> tuple[int, ...]:
        """The ids that are banned wherever they come: `banned_tokens` and bad words of one id."""
        return (*self.banned_tokens, *(word[0] for word in self._words if len(word) == 1))

    @property
    def sequences(self) -> list[tuple[int, ...]]:
        """The bad words of several ids. Texts must have become ids; see `with_bad_words`."""
        return [word for word in self._words if len(word) > 1]

    @property
    def _words(self) -> list[tuple[int, ...]]:
        if any(isinstance(word, str) for word in self.bad_words):
            raise ValueError(f"bad_words={self.bad_words!r} holds text; make ids of it before")
        return [tuple(word) for word in self.bad_words]  # type: ignore[arg-type]

    def with_bad_words(self, encode: Callable[[str], list[int]]) -> SamplingParams:
        """The same settings with the ids of each text in `bad_words`: its own, and those that it
        has after a space."""
        if not self.bad_words:
            return self
        words = dict.fromkeys(
            spelling
            for word in self.bad_words
            for spelling in (
                (tuple(encode(word.lstrip())), tuple(encode(" " + word.lstrip())))
                if isinstance(word, str)
                else (tuple(word),)
            )
        )
        return replace(self, bad_words=tuple(words))

    def samples(self) -> list[SamplingParams]:
        """The settings of each of the n samples, with n = 1 and a seed of its own: seed + i. A seed
        is drawn if there is none."""
        seed = secrets.randbelow(SEED_LIMIT - self.n) if self.seed is None else self.seed
        return [replace(self, n=1, seed=seed + sample) for sample in range(self.n)]

    def check_vocabulary(self, vocab_size: int) -> None:
        """Check the token ids against the model.

        Raises:
            InputError: an id of `logit_bias`, `banned_tokens`, `allowed_token_ids`,
                `stop_token_ids` or `bad_words` is not below `vocab_size`.
        """
        words = [token for word in self.bad_words if not isinstance(word, str) for token in word]
        for name in ("logit_bias", "banned_tokens", "allowed_token_ids", "stop_token_ids"):
            _check_below(name, getattr(self, name) or (), vocab_size)
        _check_below("bad_words", words, vocab_size)
        if self.thinking is not None:
            _check_below("thinking", (self.thinking.start, self.thinking.end), vocab_size)


def _check_below(name: str, tokens: Iterable[int], vocab_size: int) -> None:
    outside = [str(token) for token in tokens if token >= vocab_size]
    if outside:
        more = f" and {len(outside) - SHOWN} more" if len(outside) > SHOWN else ""
        raise InputError(
            f"{name} names token {', '.join(outside[:SHOWN])}{more}; "
            f"the model's ids are 0..{vocab_size - 1}",
            name,
        )


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        raise InputError(
            f"{name}={value!r} is not a sequence of token ids; use for example [2, 5]", name
        )
    tokens = tuple(map(plain, value))
    for token in tokens:
        _integer(f"{name} entry", token, 0, 2**31, name)
    return tokens


def _integer(name: str, value: object, low: int, below: int, param: str | None = None) -> None:
    """Check an integer; `param` is the setting that it belongs to, if that is not `name`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(
            f"{name}={value!r} is not an integer; give a whole number from {low}", param or name
        )
    if not low <= value < below:
        raise InputError(
            f"{name}={value} is out of range; use {low} <= {name} < {below}", param or name
        )


def _number(
    name: str,
    value: object,
    low: float,
    high: float,
    open_low: bool = False,
    param: str | None = None,
) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(
            f"{name}={value!r} is not a number; give one from {low} to {high}", param or name
        )
    if not math.isfinite(value) or not low <= value <= high or (open_low and value == low):
        raise InputError(
            f"{name}={value} is out of range; "
            f"use {low} {'<' if open_low else '<='} {name} <= {high}",
            param or name,
        )
