"""Structured output: the tokens that a request's `Guide` allows, found by llguidance on the host.

    Guide               the text: a schema, a regular expression or a grammar
      | Guides.matcher  once per request; each text is compiled once
    Matcher             follows the committed tokens of a request; gives the tokens allowed after
      |                 them and after drafts
      | ThinkingMatcher the same with thoughts before the guide begins
      | GuidedRows      once per step
    bool [B, R, V]      the step masks its logits with it, so that verification, drafts and logprobs
                        use one law

Shapes: B slots, K drafts, R = 1 + K verify rows, V logit columns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from
from llguidance.hf import from_tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from idlm.decoding.law import restrict
from idlm.decoding.verify import Allow
from idlm.errors import InputError
from idlm.models.idlm_model import Idlm
from idlm.params import Guide

COMPILED = 64
"""How many compiled guides are kept."""
LIMITS = LLParserLimits(max_grammar_size=100_000, max_lexer_states=50_000, verbose_errors=False)
"""At worst a guide then takes half a second and 100 MB to compile. llguidance's defaults bound the
time of a mask."""
OBJECT = '{"type": "object"}'
GBNF = re.compile(r"(?m)^\s*[\w-]+\s*::=")
ANNOTATIONS = {"uniqueItems"}
"""Keywords of JSON schemas that are read as annotations: the output need not obey them. So is a
`format` that llguidance does not know, as JSON Schema itself has it."""
UNKNOWN_KEYS, UNKNOWN_FORMAT = "Unimplemented keys: ", "Unknown format: "
"""How llguidance's warnings begin; the keys are a list in JSON."""
WHITESPACE = r" |\n( {0,20}|\t{0,10})"
"""The white space allowed between the parts of JSON: one space, or a line break with indentation.
If any amount were allowed, a model could write blanks forever."""
SCHEMA_OPTIONS: Any = {"whitespace_pattern": WHITESPACE, "lenient": True}
"""For llguidance. "lenient" makes warnings of what it cannot follow; `_unknown` reads them."""
LARK = "%llguidance {}"
"""The line that a grammar in Lark's form may begin with."""
SCHEMA_FAILED = "failed to compile JSON schema: "
LONGEST_REASON = 300


class Constraint(Protocol):
    """Follows the output of one request, and says which tokens may come next."""

    def restricts(self, ahead: int) -> bool:
        """Whether one of the next `ahead` tokens may be restricted."""

    @property
    def error(self) -> str:
        """Why no token is allowed; meaningful only in that case."""

    def allowed(self, ahead: Sequence[int] = ()) -> Tensor:
        """The tokens allowed after the committed tokens and the tokens `ahead`; see `Matcher`."""

    def advance(self, tokens: Sequence[int]) -> int:
        """Append committed tokens up to the first that is not allowed, and return their number."""


class Guides:
    """Compiles guides for one model, and keeps the last `COMPILED` of them."""

    def __init__(self, idlm: Idlm) -> None:
        self._idlm = idlm
        self._compiled = lru_cache(COMPILED)(self._compile)

    def matcher(
        self, guide: Guide, banned: Iterable[int] = (), only: Iterable[int] | None = None
    ) -> Matcher:
        """A matcher at the start of an output that never contains `banned` tokens, and none but
        `only`, unless that is None.

        Raises:
            InputError: the guide has an error or is too large, or the model's tokens cannot
                express it.
        """
        permitted = self._permitted.clone()
        if only is not None:
            permitted &= torch.zeros_like(permitted).index_fill(0, torch.tensor(list(only)), True)
        permitted[list(banned)] = False
        matcher = Matcher(self._compiled(guide), packed(permitted), self._idlm.eos_ids)
        if not matcher.allowed().any():
            raise _refusal(guide, matcher.error)
        return matcher

    def _compile(self, guide: Guide) -> LLMatcher:
        tokens = self._tokens  # first: its error is about the model, not about this guide
        try:
            compiled = LLMatcher(tokens, grammar_of(guide), log_level=0, limits=LIMITS)
        except ValueError as error:
            raise _refusal(guide, str(error)) from None
        if compiled.is_error():
            raise _refusal(guide, compiled.get_error())
        if unknown := _unknown(compiled.get_grammar_warnings()):
            raise _refusal(guide, f"it cannot be obeyed for {', '.join(unknown)}")
        return compiled

    @cached_property
    def _tokens(self) -> LLTokenizer:
        """The model's tokens in llguidance's form. A large vocabulary takes a second."""
        tokenizer, name = self._idlm.tokenizer, self._idlm.name
        if not isinstance(tokenizer, PreTrainedTokenizerFast) or not self._idlm.eos_ids:
            raise InputError(
                f"guide needs a fast tokenizer and an end token, and model {name!r} lacks one; "
                "drop guide"
            )
        try:
            size = max(self._idlm.vocab_size, len(tokenizer))
            return from_tokenizer(tokenizer, n_vocab=size, eos_token=sorted(self._idlm.eos_ids))
        except ValueError as error:
            reason = _brief(str(error))
            raise InputError(
                f"guide cannot be used with the tokenizer of {name!r} ({reason}); drop guide"
            ) from None

    @cached_property
    def _permitted(self) -> Tensor:
        """bool [V]: all tokens except MASK and special tokens; end tokens are permitted. A grammar
        can name special tokens, so they have to be excluded here."""
        special = [self._tokens.is_special_token(token) for token in range(self._idlm.vocab_size)]
        permitted = ~torch.tensor(special)
        permitted[sorted(self._idlm.eos_ids)] = True
        permitted[self._idlm.mask_id : self._idlm.mask_id + 1] = False
        return permitted


class Matcher:
    """Follows the output of one request. A set of tokens is a bit mask, uint8 [ceil(V / 8)]: token
    t is bit t % 8 of byte t // 8."""

    def __init__(self, compiled: LLMatcher, permitted: Tensor, ends: frozenset[int]) -> None:
        self._start, self._permitted, self._ends = compiled, permitted, ends
        self._matcher = compiled.deep_copy()
        self._output: list[int] = []
        self._masks: dict[tuple[int, ...], Tensor] = {}
        self._failure = ""

    def restricts(self, ahead: int) -> bool:
        """True: past its end a guide allows the end token alone."""
        return True

    @property
    def error(self) -> str:
        """Why no token is allowed; meaningful only in that case."""
        return (
            self._failure
            or "the vocabulary and the request's bans leave no token that the guide allows"
        )

    def allowed(self, ahead: Sequence[int] = ()) -> Tensor:
        """The tokens allowed after the committed tokens and the tokens `ahead`.

        Past the guide's end, and after tokens `ahead` that the guide refuses, all tokens are
        allowed, since none of them is ever committed. Masks are cached: the next step verifies
        drafts with the masks that they were drawn with.
        """
        path = tuple(ahead)
        if path not in self._masks:
            self._masks[path] = self._mask(list(path))
        return self._masks[path]

    def advance(self, tokens: Sequence[int]) -> int:
        """Append committed tokens up to the first that is not allowed, and return their number.

        If it is less than len(tokens), the guide allowed no token at that place: see `error`.
        """
        good = 0
        while good < len(tokens) and holds(self.allowed(tokens[:good]), tokens[good]):
            good += 1
        taken = tuple(tokens[:good])
        self._output += taken
        self._matcher.try_consume_tokens(self._text(taken))
        self._masks = {
            path[good:]: mask for path, mask in self._masks.items() if path[:good] == taken
        }
        return good

    def _mask(self, path: list[int]) -> Tensor:
        consumed = self._matcher.try_consume_tokens(self._text(path))
        if consumed < len(path):
            self._matcher.rollback(consumed)
            return torch.full_like(self._permitted, 255)
        mask = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        if self._matcher.is_error():
            return self._fail(self._matcher.get_error())
        self._matcher.rollback(consumed)
        return mask[: len(self._permitted)] & self._permitted

    def _fail(self, reason: str) -> Tensor:
        """Replace llguidance's matcher, which is of no use after an error, by a fresh one at the
        committed tokens: the output may not take the path that failed. Returns an empty mask."""
        self._failure = _brief(reason)
        self._matcher = self._start.deep_copy()
        self._matcher.try_consume_tokens(self._text(self._output))
        return torch.zeros_like(self._permitted)

    def _text(self, tokens: Sequence[int]) -> list[int]:
        """The tokens before the first end token."""
        end = next(
            (place for place, token in enumerate(tokens) if token in self._ends), len(tokens)
        )
        return list(tokens[:end])


class GuidedRows:
    """The matchers of a step's slots, None for those without a guide.

    Matchers need the values of tokens. So the host waits for the device within the step, and the
    results of all earlier steps must be read before the launch. Only steps with a guided request
    pay for this.
    """

    def __init__(self, matchers: Sequence[Constraint | None], vocab_size: int) -> None:
        self._matchers = matchers
        self._vocab_size = vocab_size
        self._all = torch.full((-(-vocab_size // 8),), 255, dtype=torch.uint8)

    def restrict(self, logits: Tensor, drafts: Tensor, valid: Tensor) -> Tensor:
        """Mask the `logits` [B, 1 + K, V] of verify rows. Row k comes after the first k of `drafts`
        [B, K]; the first `valid` [B] drafts count."""
        rows = zip(drafts.tolist(), valid.tolist(), strict=True)
        paths = [[row[: min(k, count)] for k in range(len(row) + 1)] for row, count in rows]
        return restrict(logits, self._allowed(paths, drafts.device))

    def allow(self, tokens: Tensor, number: Tensor) -> Allow:
        """A function that gives the tokens allowed after drafts, once this step has committed the
        first `number` [B] of `tokens` [B, R]."""
        committed = [
            row[:count] for row, count in zip(tokens.tolist(), number.tolist(), strict=True)
        ]

        def allow(drafts: Tensor) -> Tensor:
            paths = [[before + row] for before, row in zip(committed, drafts.tolist(), strict=True)]
            return self._allowed(paths, drafts.device)

        return allow

    def _allowed(self, paths: Sequence[Sequence[list[int]]], device: torch.device) -> Tensor:
        """bool [B, R, V]: the tokens allowed after each of a slot's R paths. A path is a list of
        tokens that follow the committed ones."""
        return _unpacked(self.bits(paths).to(device), self._vocab_size)

    def bits(self, paths: Sequence[Sequence[list[int]]]) -> Tensor:
        """The tokens of `_allowed` as bit masks, uint8 [B, R, ceil(V / 8)], on the host."""
        bits = [
            torch.stack([self._all if matcher is None else matcher.allowed(path) for path in row])
            for matcher, row in zip(self._matchers, paths, strict=True)
        ]
        return torch.stack(bits)


def grammar_of(guide: Guide) -> str:
    """The guide as a grammar for llguidance.

    Raises:
        ValueError: the text is not of the kind that the guide names.
    """
    if guide.kind in ("json_object", "json_schema"):
        return LLMatcher.grammar_from_json_schema(guide.text or OBJECT, overrides=SCHEMA_OPTIONS)
    if guide.kind == "regex":
        return LLMatcher.grammar_from_regex(guide.text)
    if guide.kind == "choice":
        return LLMatcher.grammar_from_lark(f"start: {' | '.join(map(_literal, _choices(guide)))}")
    if GBNF.search(guide.text) and not guide.text.startswith(LARK):
        return grammar_from("gbnf", guide.text)
    return LLMatcher.grammar_from_lark(guide.text)


def _choices(guide: Guide) -> list[str]:
    choices = json.loads(guide.text)
    strings = isinstance(choices, list) and all(isinstance(one, str) for one in choices)
    if not strings or not choices:
        raise ValueError("choices are a list of one string or more")
    return choices


def _literal(text: str) -> str:
    """`text` as a string of a Lark grammar: JSON's, with DEL escaped too."""
    return json.dumps(text).replace("\x7f", "\\u007f")


class CallForm(NamedTuple):
    """The texts around tool calls, their names and their arguments."""

    opening: str
    before_name: str
    before_arguments: str
    after: str
    between: str
    closing: str


LIST_OF_CALLS = CallForm("[", '{"name": ', ', "parameters": ', "}", ", ", "]")
EMBEDDABLE = ("json_object", "json_schema", "choice")


def calls_grammar(
    schemas: Mapping[str, Mapping[str, Any]], most: int, form: CallForm = LIST_OF_CALLS
) -> str:
    """A grammar for 1 to `most` calls: a name of `schemas`, and arguments that obey its schema.

    Each schema stays a document of its own: pointers within it, "#" too, mean what they meant.
    """
    calls = [
        f"{_literal(form.before_name + json.dumps(name) + form.before_arguments)} "
        f"%json {_with_options(schema)} {_literal(form.after)}"
        for name, schema in schemas.items()
    ]
    more = f" ({_literal(form.between)} call){{0,{most - 1}}}" if most > 1 else ""
    return (
        f"{LARK}\nstart: {_literal(form.opening)} call{more} {_literal(form.closing)}\n"
        f"call: {' | '.join(calls)}"
    )


def or_calls(guide: Guide, names: Iterable[str], most: int, form: CallForm) -> Guide:
    """A guide for what `guide` allows, or else calls of functions with any arguments. A guide that
    is not of an `EMBEDDABLE` kind stays alone."""
    if guide.kind not in EMBEDDABLE:
        return guide
    if guide.kind == "choice":
        answer = " | ".join(map(_literal, _choices(guide)))
    else:
        answer = f"%json {_with_options(json.loads(guide.text or OBJECT))}"
    calls = calls_grammar({name: json.loads(OBJECT) for name in names}, most, form)
    text = calls.replace("\nstart: ", f"\nstart: answer | calls\nanswer: {answer}\ncalls: ", 1)
    return Guide("grammar", text, guide.name)


def _with_options(schema: Mapping[str, Any]) -> str:
    return json.dumps({**schema, "x-guidance": SCHEMA_OPTIONS})


def _unknown(warnings: Sequence[str]) -> list[str]:
    """What a schema asks for and the output could break; see `ANNOTATIONS`."""
    keys = [w.removeprefix(UNKNOWN_KEYS) for w in warnings if w.startswith(UNKNOWN_KEYS)]
    others = [w for w in warnings if not w.startswith((UNKNOWN_KEYS, UNKNOWN_FORMAT))]
    return [*sorted({key for group in keys for key in json.loads(group)} - ANNOTATIONS), *others]


def _refusal(guide: Guide, reason: str) -> InputError:
    what, repair = f"guide {guide.kind!r}", f"mend {guide.text[:40]!r}"
    if guide.name:
        what, repair = guide.name, "change it"
    return InputError(f"{what} cannot be used: {_brief(reason)}; {repair}", guide.name or "guide")


def _brief(reason: str) -> str:
    """A message of llguidance on one line, cut to `LONGEST_REASON` characters. Of a schema within
    a grammar it is the schema's own."""
    if SCHEMA_FAILED in reason:
        reason = reason.partition(SCHEMA_FAILED)[2].partition("\n")[0]
    return " ".join(reason.replace("<non-verbose/>", "").split())[:LONGEST_REASON]


def _powers(device: torch.device) -> Tensor:
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)


def packed(flags: Tensor) -> Tensor:
    """Pack bool [V] into a bit mask, uint8 [ceil(V / 8)]; see `Matcher`."""
    padded = torch.nn.functional.pad(flags.to(torch.uint8), (0, -len(flags) % 8))
    return (padded.unflatten(0, (-1, 8)) * _powers(flags.device)).sum(dim=1).to(torch.uint8)


def _unpacked(bits: Tensor, vocab_size: int) -> Tensor:
    """Unpack bit masks, uint8 [..., ceil(V / 8)], into bool [..., V]."""
    return ((bits[..., None] & _powers(bits.device)) != 0).flatten(-2)[..., :vocab_size]


def holds(bits: Tensor, token: int) -> bool:
    return bool(int(bits[token // 8]) >> (token % 8) & 1)
