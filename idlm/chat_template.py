"""Turns every prompt into token ids: a text, messages under the chat template, or ids to check.

Special tokens in a message's content are plain text, so that a user cannot forge a turn. A template
writes special tokens too, and in the rendered text they look the same. So those of the messages are
replaced before:

    1. read the messages (`idlm.messages`), with contents in the form that the template shows
    2. replace special strings in the messages by placeholders
    3. render the chat template
    4. split the text at the placeholders
    5. encode each piece: the template's text with special tokens, a special string without
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

from transformers import AddedToken, PreTrainedTokenizerBase

from idlm.errors import InputError
from idlm.inputs import check_text, plain
from idlm.messages import as_template_takes, read_messages

Message = Mapping[str, Any]
Messages = str | Iterable[Message]
"""A conversation as `idlm.messages` reads it."""
OPEN, CLOSE = "\ue000", "\ue001"
"""Private-use characters around the index of a special string. If a message contains them, they are
replaced like special strings."""
ANSWER, CLOSED = (True, False), (False, False)  # `ending` of `_render`
PLACEHOLDER = re.compile(f"{OPEN}([0-9]+){CLOSE}")
PROBE = "a probe of idlm"
PROBE_PARTS = [{"type": "text", "text": PROBE}]


class Bounds(Protocol):
    """The limits of a model on token ids; `Idlm` has them."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def mask_id(self) -> int: ...
    @property
    def context(self) -> int: ...


def check_ids(ids: Iterable[object], model: Bounds) -> list[int]:
    """Check the ids of a prompt.

    Raises:
        InputError: there are none or too many, or an id is MASK, outside the vocabulary, or not an
            integer.
    """
    tokens = _whole_numbers(ids, "prompt")
    if not tokens:
        raise InputError(
            f"a prompt has 0 tokens; this model takes 1 to {model.context - 1}", "prompt"
        )
    if len(tokens) >= model.context:
        raise too_long(f"a prompt has {len(tokens)} tokens", model.context)
    if model.mask_id in tokens:
        raise InputError(
            f"a prompt holds the MASK token {model.mask_id}; take it out, it stands for no text",
            "prompt",
        )
    return check_tokens(tokens, model.vocab_size)


def too_long(what: str, context: int) -> InputError:
    """The error for a prompt that does not fit the context, in words that clients search for."""
    return InputError(
        f"{what}; this model's maximum context length is {context} tokens, and one of them is for "
        "the output: shorten it",
        "prompt",
        "context_length_exceeded",
    )


def check_tokens(ids: Iterable[object], vocab_size: int, what: str = "prompt") -> list[int]:
    """Check that all ids are in the vocabulary. Any number of them is allowed.

    Raises:
        InputError: an id is not in the vocabulary; `what` names the input in the message.
    """
    tokens = _whole_numbers(ids, what)
    if tokens and not 0 <= min(tokens) <= max(tokens) < vocab_size:
        wrong = next(token for token in tokens if not 0 <= token < vocab_size)
        shown = wrong if abs(wrong) < 2**64 else "of more than 64 bits"
        raise InputError(
            f"{what} token {shown} is outside the vocabulary 0..{vocab_size - 1}", what
        )
    return tokens


def _whole_numbers(ids: Iterable[object], what: str) -> list[int]:
    tokens: list[Any] = list(ids)
    return tokens if set(map(type, tokens)) <= {int} else [_whole(token, what) for token in tokens]


def _whole(token: Any, what: str) -> int:
    """A whole number as int; NumPy's and PyTorch's are taken too."""
    value = plain(token)
    if type(value) is not int:
        raise InputError(
            f"{what} token {token!r} is not a whole number; give text or token ids", what
        )
    return value


class PromptEncoder:
    """Encodes texts and messages for a model.

    Args:
        tokenizer: the model's tokenizer; None for a model that takes token ids only.
        name: the model's name, for error messages.
        context: the most positions of a sequence. A text that cannot fit is refused before it is
            tokenised. None: no limit.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | None, name: str, context: int | None = None
    ) -> None:
        self.name, self._context = name, context
        self._tokenizer = tokenizer
        self._shown: dict[str, tuple[bool, bool]] = {}

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer. It is untyped, as much of its interface is.

        Raises:
            InputError: the model has none.
        """
        if self._tokenizer is None:
            raise InputError(f"model {self.name!r} has no tokenizer; give the prompt as token ids")
        return self._tokenizer

    def template_for(self, tools: bool) -> str:
        """The chat template. Of several, "tool_use" if there are tools, else "default", else the
        only one.

        Raises:
            InputError: the model has none, or several and none of these.
        """
        templates = self.tokenizer.chat_template
        if not templates:
            raise InputError(
                f"model {self.name!r} has no chat template; give a text instead of messages"
            )
        if isinstance(templates, str):
            return templates
        wanted = ["tool_use", "default"] if tools else ["default"]
        only = list(templates) if len(templates) == 1 else []
        for name in [*wanted, *only]:
            if name in templates:
                return str(templates[name])
        raise InputError(
            f"model {self.name!r} has the chat templates {', '.join(sorted(templates))}, "
            "and none is the default; rename one of them to 'default'"
        )

    @property
    def has_template(self) -> bool:
        """Whether the model has a chat template, so that messages can be encoded."""
        return self._tokenizer is not None and bool(self.tokenizer.chat_template)

    def text(self, text: str, add_special_tokens: bool = True, trusted: bool = False) -> list[int]:
        """Encode a text.

        Args:
            add_special_tokens: add the tokenizer's own, such as a start token.
            trusted: special strings in the text become special tokens; otherwise they are plain
                text. Only for a caller that wrote the whole text.

        Raises:
            InputError: the text cannot fit the context, or there is no tokenizer.
        """
        tokenizer = self.tokenizer if trusted else self._plain
        self._check(text)
        return list(tokenizer(text, add_special_tokens=add_special_tokens).input_ids)

    def continuation(self, text: str, continued: str) -> list[int]:
        """The ids that continue those of `text`, so that both together are `text + continued`.

        Special strings become special tokens. Encoded alone, a continued word would begin with the
        space that some tokenizers add.

        Raises:
            InputError: as `text`.
        """
        before = self.text(text, trusted=True)
        whole = self.text(text + continued, trusted=True)
        if whole[: len(before)] == before:
            return whole[len(before) :]
        return self.inner(continued)

    def inner(self, text: str) -> list[int]:
        """The ids of a text that follows another; special strings become special tokens.

        Raises:
            InputError: as `text`.
        """
        self._check(text)
        return _inner(self.tokenizer, text)

    def chat(
        self,
        messages: Messages,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        options: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Encode a conversation; `options` are variables of the chat template, and
        `continue_final_message` leaves the last message open.

        Raises:
            InputError: a message cannot be read, the template raises an error, an option is an
                argument of `apply_chat_template`, the text is too long, or there is no template.
        """
        ending = add_generation_prompt, continue_final_message
        return self._encode_rendered(*self._render(messages, tools, ending, options or {}))

    def exchange(
        self, messages: Messages, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> tuple[list[int], list[int]]:
        """Encode a conversation that ends with an answer: the ids before it, as `chat` gives them,
        and those of the answer, with the end that the template writes.

        Raises:
            InputError: as `chat`; or the last message is the only one, or calls tools in a template
                that writes earlier answers differently.
        """
        *before, answer = read_messages(messages)
        text, literals = self._render(before, tools, ANSWER, {})
        whole, all_literals = self._render([*before, answer], tools, CLOSED, {})
        ids = self._encode_rendered(text, literals)
        if whole.startswith(text):
            together = self._encode_rendered(whole, all_literals)
            if together[: len(ids)] == ids:
                return ids, together[len(ids) :]
            return ids, self._encode_pieces(whole[len(text) :], all_literals)
        if "tool_calls" in answer:
            raise InputError("the chat template does not write this answer after its prompt")
        (content,) = as_template_takes([answer], texts=True, parts=False)
        return ids, _inner(self._plain, content["content"])

    def chats(self, conversations: Iterable[Messages]) -> list[list[int]]:
        """Encode many conversations with a generation prompt; faster than `chat` for each.

        Raises:
            InputError: as `chat`.
        """
        rendered = [self._render(messages, None, ANSWER, {}) for messages in conversations]
        without_literals = [text for text, literals in rendered if not literals]
        encoded = iter(self._encode(without_literals))  # the tokenizer encodes a batch in parallel
        return [
            self._encode_pieces(text, literals) if literals else next(encoded)
            for text, literals in rendered
        ]

    def _encode_rendered(self, text: str, literals: list[str]) -> list[int]:
        return self._encode_pieces(text, literals) if literals else self._encode([text])[0]

    def _render(
        self, messages: Any, tools: Any, ending: tuple[bool, bool], options: Mapping[str, Any]
    ) -> tuple[str, list[str]]:
        """A conversation's text and placeholders' strings. `ending`: `add_generation_prompt` and
        `continue_final_message`."""
        template, literals = self.template_for(bool(tools)), list[str]()
        for name in options:
            arguments = inspect.signature(self.tokenizer.apply_chat_template).parameters
            if name == "messages" or name in arguments:
                raise InputError(
                    f"chat_template_kwargs names {name!r}, which is the server's; leave it out"
                )
        messages = as_template_takes(read_messages(messages), *self.contents(template))
        tools, options, messages = (  # last, so that more messages do not change the numbers
            self._hide(value, literals) for value in (tools, options, messages)
        )
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tools,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=ending[0],
                continue_final_message=ending[1],
                **options,
            )
        except Exception as error:  # a template may raise anything
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"the chat template refuses these messages ({reason}); change them"
            ) from error
        self._check(text)
        return str(text), literals

    def contents(self, template: str) -> tuple[bool, bool]:
        """Whether the template shows contents that are texts, and contents that are lists of parts;
        found by rendering one of each."""
        if template not in self._shown:
            texts, parts = (self._shows(template, content) for content in (PROBE, PROBE_PARTS))
            self._shown[template] = (texts or not parts, parts)
        return self._shown[template]

    def _shows(self, template: str, content: Any) -> bool:
        messages = [{"role": "user", "content": content}]
        try:
            text = self.tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=True
            )
        except Exception:  # a template may raise anything
            return False
        # a template of texts may write a list as Python or JSON does
        return PROBE in text and "'type': 'text'" not in text and '"type": "text"' not in text

    def _hide(self, value: Any, literals: list[str]) -> Any:
        """Replace special strings in a value by placeholders; they are appended to `literals`."""
        if isinstance(value, str):
            return self._specials.sub(lambda match: _placeholder(match[0], literals), value)
        if isinstance(value, Mapping):
            return {
                self._hide(key, literals): self._hide(item, literals) for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self._hide(item, literals) for item in value]
        return value

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return list(self.tokenizer(texts, add_special_tokens=False).input_ids) if texts else []

    def _encode_pieces(self, text: str, literals: list[str]) -> list[int]:
        """Encode a rendered text with placeholders."""
        ids: list[int] = []
        for index, piece in enumerate(PLACEHOLDER.split(text)):
            if index % 2:  # the captured index of a placeholder
                ids += _inner(self._plain, literals[int(piece)])
            elif piece:
                ids += _inner(self.tokenizer, piece)
        return ids

    def _check(self, text: str) -> None:
        check_text(text, "the prompt")
        if self._context is not None and len(text) > self._context * self._longest:
            raise too_long(f"a prompt has {len(text)} characters", self._context)

    @cached_property
    def _longest(self) -> int:
        """The number of characters of the longest token of the vocabulary."""
        return max(map(len, self.tokenizer.get_vocab()))

    @cached_property
    def _control_strings(self) -> list[str]:
        """The strings of special tokens, with MASK; longest first, so that the longest matches."""
        added = self.tokenizer.added_tokens_decoder.values()
        strings = {str(token) for token in added if token.special}
        strings |= set(self.tokenizer.all_special_tokens)
        return sorted(filter(None, strings), key=len, reverse=True)

    @cached_property
    def _specials(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, [*self._control_strings, OPEN, CLOSE])))

    @cached_property
    def _plain(self) -> Any:
        """A copy of the tokenizer that encodes special strings as text. It is a copy because
        switching the mode is not thread-safe."""
        plain = copy.deepcopy(self.tokenizer)
        specials = [
            AddedToken(text, special=True, normalized=False) for text in self._control_strings
        ]
        plain.add_tokens(specials, special_tokens=True)
        plain.split_special_tokens = True
        return plain


def _inner(tokenizer: Any, piece: str) -> list[int]:
    """Encode a piece from inside a text.

    It is encoded after a newline, whose ids are removed, since some tokenizers add a space at the
    start of a text; after a full stop if the tokenizer drops newlines.
    """
    for before in ("\n", "."):
        head: list[int] = tokenizer(before, add_special_tokens=False).input_ids
        ids: list[int] = tokenizer(before + piece, add_special_tokens=False).input_ids
        if head and ids[: len(head)] == head:
            return ids[len(head) :]
    return list(tokenizer(piece, add_special_tokens=False).input_ids)


def _placeholder(literal: str, literals: list[str]) -> str:
    literals.append(literal)
    return f"{OPEN}{len(literals) - 1}{CLOSE}"
