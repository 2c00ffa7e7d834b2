"""Structured output: which tokens a request's `Guide` allows, found by llguidance on the host.

    Guide      the text: a schema, a regular expression, a grammar
      | Guides.matcher, once a request; the same text is compiled once
    Matcher    follows the committed tokens of one request, and says what may come after them and
    some drafts
      | GuidedRows, once a step
    bool [B, R, V], which the step folds into the logits: verification, drafts and logprobs see one
    law

Shapes: B slots, K drafts, R = 1 + K verify rows, V logit columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache

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
"""Guides that stay compiled."""
LIMITS = LLParserLimits(max_grammar_size=100_000, max_lexer_states=50_000, verbose_errors=False)
"""Half a second to compile and 100 MB at worst; the time of a mask is bounded by llguidance's
defaults."""
OBJECT = '{"type": "object"}'
WHITESPACE = r" |\n( {0,20}|\t{0,10})"
"""Between the parts of JSON: as it is usually printed, on one line or indented. A model that has
lost its way would write blanks forever where any number is allowed."""
LONGEST_REASON = 300


class Guides:
    """Compiles guides for one model."""

    def __init__(self, idlm: Idlm) -> None:
        self._idlm = idlm
        self._compiled = lru_cache(COMPILED)(self._compile)

    def matcher(self, guide: Guide, banned: Iterable[int] = ()) -> Matcher:
        """A matcher at the start of an output in which `banned` tokens never come out.

        Raises:
            InputError: the guide has an error, is too large, or cannot be followed with this
                model's tokens.
        """
        permitted = self._permitted.clone()
        permitted[list(banned)] = False
        matcher = Matcher(self._compiled(guide), _packed(permitted), self._ends)
        if not matcher.allowed().any():
            raise _refusal(guide, matcher.error)
        return matcher

    def _compile(self, guide: Guide) -> LLMatcher:
        tokens = self._tokens  # first: a model that can follow no guide is no fault of the guide
        try:
            compiled = LLMatcher(tokens, _grammar(guide), log_level=0, limits=LIMITS)
        except ValueError as error:
            raise _refusal(guide, str(error)) from None
        if compiled.is_error():
            raise _refusal(guide, compiled.get_error())
        return compiled

    @cached_property
    def _tokens(self) -> LLTokenizer:
        """The model's tokens as llguidance wants them; takes a second for a large vocabulary."""
        tokenizer, name = self._idlm.tokenizer, self._idlm.name
        if not isinstance(tokenizer, PreTrainedTokenizerFast) or not self._ends:
            raise InputError(
                f"guide needs a fast tokenizer and an end token, and model {name!r} lacks one; "
                "drop guide"
            )
        try:
            size = max(self._idlm.vocab_size, len(tokenizer))
            return from_tokenizer(tokenizer, n_vocab=size, eos_token=sorted(self._ends))
        except ValueError as error:
            reason = _brief(str(error))
            raise InputError(
                f"guide cannot be used with the tokenizer of {name!r} ({reason}); drop guide"
            ) from None

    @cached_property
    def _ends(self) -> frozenset[int]:
        return frozenset(token for token in self._idlm.eos_ids if token < self._idlm.vocab_size)

    @cached_property
    def _permitted(self) -> Tensor:
        """bool [V]: no special tokens but the ends, though a grammar can name them, and no MASK."""
        special = [self._tokens.is_special_token(token) for token in range(self._idlm.vocab_size)]
        permitted = ~torch.tensor(special)
        permitted[sorted(self._ends)] = True
        permitted[self._idlm.mask_id : self._idlm.mask_id + 1] = False
        return permitted


class Matcher:
    """Follows the output of one request. Sets of tokens are bits, uint8 [ceil(V / 8)], the lowest
    token lowest."""

    def __init__(self, compiled: LLMatcher, permitted: Tensor, ends: frozenset[int]) -> None:
        self._start, self._permitted, self._ends = compiled, permitted, ends
        self._matcher = compiled.deep_copy()
        self._output: list[int] = []
        self._masks: dict[tuple[int, ...], Tensor] = {}
        self._failure = ""

    @property
    def error(self) -> str:
        """Why nothing is allowed, where nothing is."""
        return (
            self._failure
            or "the vocabulary and the request's bans leave no token that the guide allows"
        )

    def allowed(self, ahead: Sequence[int] = ()) -> Tensor:
        """What may come after the committed tokens and those `ahead`.

        All tokens past the guide's end, and after tokens ahead that it refuses: nothing there is
        ever committed. The masks that drafts are drawn with verify them in the next step, so they
        are kept until then.
        """
        path = tuple(ahead)
        if path not in self._masks:
            self._masks[path] = self._mask(list(path))
        return self._masks[path]

    def advance(self, tokens: Sequence[int]) -> int:
        """Take committed tokens up to the first that is not allowed; returns how many.

        Fewer than all mean that the law had nothing to choose from: see `error`.
        """
        good = 0
        while good < len(tokens) and _holds(self.allowed(tokens[:good]), tokens[good]):
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
        """llguidance gave up here and stays so: begin again for where the output may still go
        another way."""
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

    They look at tokens, so the host waits for the device within the step, and a step must not be
    launched before the last one has been read. Only steps with a guided request pay for that.
    """

    def __init__(self, matchers: Sequence[Matcher | None], vocab_size: int) -> None:
        self._matchers = matchers
        self._vocab_size = vocab_size
        self._all = torch.full((-(-vocab_size // 8),), 255, dtype=torch.uint8)

    def restrict(self, logits: Tensor, drafts: Tensor, valid: Tensor) -> Tensor:
        """Verify rows [B, 1 + K, V], row k after the first k of `drafts` [B, K], of which `valid`
        [B] count."""
        rows = zip(drafts.tolist(), valid.tolist(), strict=True)
        paths = [[row[: min(k, count)] for k in range(len(row) + 1)] for row, count in rows]
        return restrict(logits, self._allowed(paths, drafts.device))

    def allow(self, tokens: Tensor, number: Tensor) -> Allow:
        """What the next drafts may be after this step has committed the first `number` [B] of
        `tokens` [B, R]."""
        committed = [
            row[:count] for row, count in zip(tokens.tolist(), number.tolist(), strict=True)
        ]

        def allow(drafts: Tensor) -> Tensor:
            paths = [[before + row] for before, row in zip(committed, drafts.tolist(), strict=True)]
            return self._allowed(paths, drafts.device)

        return allow

    def _allowed(self, paths: Sequence[Sequence[list[int]]], device: torch.device) -> Tensor:
        """bool [B, R, V] of R paths a slot, each of tokens ahead of what is committed."""
        bits = [
            torch.stack([self._all if matcher is None else matcher.allowed(path) for path in row])
            for matcher, row in zip(self._matchers, paths, strict=True)
        ]
        return _unpacked(torch.stack(bits).to(device), self._vocab_size)


def _grammar(guide: Guide) -> str:
    """What llguidance compiles.

    Raises:
        ValueError: the text is not of its kind.
    """
    if guide.kind in ("json_object", "json_schema"):
        return LLMatcher.grammar_from_json_schema(
            guide.text or OBJECT, overrides={"whitespace_pattern": WHITESPACE}
        )
    return grammar_from("regex" if guide.kind == "regex" else "grammar", guide.text)


def _refusal(guide: Guide, reason: str) -> InputError:
    return InputError(
        f"guide {guide.kind!r} cannot be used: {_brief(reason)}; mend {guide.text[:40]!r}"
    )


def _brief(reason: str) -> str:
    """A message of llguidance on one line."""
    return " ".join(reason.replace("<non-verbose/>", "").split())[:LONGEST_REASON]


def _powers(device: torch.device) -> Tensor:
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)


def _packed(flags: Tensor) -> Tensor:
    """bool [V] as bits."""
    padded = torch.nn.functional.pad(flags.to(torch.uint8), (0, -len(flags) % 8))
    return (padded.unflatten(0, (-1, 8)) * _powers(flags.device)).sum(dim=1).to(torch.uint8)


def _unpacked(bits: Tensor, vocab_size: int) -> Tensor:
    """bool [..., V] of bits [..., ceil(V / 8)]."""
    return ((bits[..., None] & _powers(bits.device)) != 0).flatten(-2)[..., :vocab_size]


def _holds(bits: Tensor, token: int) -> bool:
    return bool(int(bits[token // 8]) >> (token % 8) & 1)
