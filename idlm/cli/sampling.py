"""The sampling options: `@with_sampling` gives them to a command as one `Sampling`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from idlm.errors import InputError
from idlm.params import SamplingParams

if TYPE_CHECKING:
    from idlm.models.idlm_model import Idlm

PLAIN = SamplingParams()
"""The defaults where the model's generation config gives none."""
OF_MODELS = (
    *("max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p"),
    "repetition_penalty",
)
"""Options that count as given even at the default of `SamplingParams`: the model's may differ."""


@dataclass(frozen=True)
class Sampling:
    """The sampling options that were given, checked.

    Attributes:
        given: fields of `SamplingParams`.
        generation_config: where the others come from; see `EngineConfig`.
    """

    given: dict[str, Any]
    generation_config: str

    def of(self, idlm: Idlm) -> SamplingParams:
        """The settings of a request to this model.

        Raises:
            InputError: a default of the model's generation config is out of range.
        """
        return idlm.sampling(self.given, self.generation_config)

    @property
    def plain(self) -> SamplingParams:
        """What was given alone, without the defaults of a model's generation config."""
        return SamplingParams(**self.given)


def _option(help: str, **settings: Any) -> Any:
    return typer.Option(help=help, rich_help_panel="Sampling", **settings)


def _or_models(help: str, name: str) -> Any:
    """An option whose default is the model's, if its generation config has one."""
    return _option(help, show_default=f"the model's, or {getattr(PLAIN, name)}")


def sampling_options(
    max_tokens: Annotated[
        int | None, _or_models("The most tokens to generate.", "max_tokens")
    ] = None,
    temperature: Annotated[float | None, _or_models("0 is greedy.", "temperature")] = None,
    top_k: Annotated[
        int | None, _or_models("Keep the k likeliest tokens; 0 keeps all.", "top_k")
    ] = None,
    top_p: Annotated[
        float | None, _or_models("Keep the likeliest tokens that hold this probability.", "top_p")
    ] = None,
    min_p: Annotated[
        float | None,
        _or_models("Drop tokens less likely than this share of the likeliest.", "min_p"),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        _or_models("Divide the logits of tokens that were there; 1 is none.", "repetition_penalty"),
    ] = None,
    presence_penalty: Annotated[
        float, _option("Subtract from the logits of tokens in the output.")
    ] = 0.0,
    frequency_penalty: Annotated[float, _option("The same, for each time they are in it.")] = 0.0,
    logit_bias: Annotated[
        list[str] | None,
        _option("Add to a token's logit; can be repeated.", metavar="TOKEN_ID=BIAS"),
    ] = None,
    stop: Annotated[
        list[str] | None, _option("End at this text, which is left out; can be repeated.")
    ] = None,
    min_tokens: Annotated[
        int | None, _or_models("No end before so many tokens.", "min_tokens")
    ] = None,
    n: Annotated[int, _option("Samples of each prompt.")] = 1,
    banned_token: Annotated[
        list[int] | None, _option("Never emit this token id; can be repeated.")
    ] = None,
    allowed_token: Annotated[
        list[int] | None, _option("Emit no other token id; can be repeated.")
    ] = None,
    bad_word: Annotated[
        list[str] | None, _option("Do not write this text; can be repeated.")
    ] = None,
    seed: Annotated[
        int | None, _option("Seed of the noise; drawn and reported if not given.")
    ] = None,
    ignore_eos: Annotated[bool, _option("Go on after the model's end token.")] = False,
    verification: Annotated[
        Literal["coupled", "ratio", "relaxed"],
        _option("Which drafts stand; relaxed is approximate."),
    ] = "coupled",
    tau: Annotated[
        float | None, _option("Relaxed only: the share of the likeliest that is enough.")
    ] = None,
    generation_config: Annotated[
        Literal["auto", "none"],
        _option("Whether the model's generation_config.json gives the defaults."),
    ] = "auto",
) -> Sampling:
    """The options as `Sampling`; `SamplingParams` validates them."""
    options = {
        "n": n,
        "max_tokens": max_tokens,
        "min_tokens": min_tokens,
        "stop": tuple(stop or ()),
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "logit_bias": dict(_bias(entry) for entry in logit_bias or []),
        "banned_tokens": tuple(banned_token or ()),
        "allowed_token_ids": tuple(allowed_token) if allowed_token else None,
        "bad_words": tuple(bad_word or ()),
        "seed": seed,
        "ignore_eos": ignore_eos,
        "verification": verification,
        "tau": tau,
    }
    given = {
        name: value
        for name, value in options.items()
        if value is not None and (name in OF_MODELS or value != getattr(PLAIN, name))
    }
    sampling = Sampling(given, generation_config)
    _ = sampling.plain  # validates them before a model is loaded
    return sampling


def _bias(entry: str) -> tuple[int, float]:
    token, _, bias = entry.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise InputError(
            f"--logit-bias {entry!r} is not TOKEN_ID=BIAS; write for example 42=-1.5"
        ) from None


def with_sampling(
    command: Callable[..., None], without: tuple[str, ...] = ()
) -> Callable[..., None]:
    """Replace the parameter `sampling` of a command by the sampling options, `without` some."""
    signature = inspect.signature(command, eval_str=True)
    every = inspect.signature(sampling_options, eval_str=True).parameters
    options = {name: option for name, option in every.items() if name not in without}

    def run(**values: Any) -> None:
        chosen = {name: values.pop(name) for name in options}
        command(sampling=sampling_options(**chosen), **values)

    remaining = [
        parameter for parameter in signature.parameters.values() if parameter.name != "sampling"
    ]
    added = [option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in options.values()]
    run.__doc__ = command.__doc__
    run.__signature__ = signature.replace(parameters=[*remaining, *added])  # type: ignore[attr-defined]
    run.__annotations__ = {
        parameter.name: parameter.annotation for parameter in [*remaining, *added]
    }
    return run
