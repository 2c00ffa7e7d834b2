"""The sampling options: `@with_sampling` gives them to a command as one `SamplingParams`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal

import typer

from idlm.errors import InputError
from idlm.params import SamplingParams


def _option(help: str, **settings: Any) -> Any:
    return typer.Option(help=help, rich_help_panel="Sampling", **settings)


def sampling_params(
    max_tokens: Annotated[int, _option("The most tokens to generate.")] = 256,
    temperature: Annotated[float, _option("0 is greedy.")] = 1.0,
    top_k: Annotated[int, _option("Keep the k likeliest tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, _option("Keep the likeliest tokens that hold this probability.")] = 1.0,
    min_p: Annotated[
        float, _option("Drop tokens less likely than this share of the likeliest.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, _option("Divide the logits of tokens that were there; 1 is none.")
    ] = 1.0,
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
    min_tokens: Annotated[int, _option("No end before so many tokens.")] = 0,
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
) -> SamplingParams:
    """The options as `SamplingParams`, which validates them."""
    return SamplingParams(
        n=n,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop=tuple(stop or ()),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=dict(_bias(entry) for entry in logit_bias or []),
        banned_tokens=tuple(banned_token or ()),
        allowed_token_ids=tuple(allowed_token) if allowed_token else None,
        bad_words=tuple(bad_word or ()),
        seed=seed,
        ignore_eos=ignore_eos,
        verification=verification,
        tau=tau,
    )


def _bias(entry: str) -> tuple[int, float]:
    token, _, bias = entry.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise InputError(
            f"--logit-bias {entry!r} is not TOKEN_ID=BIAS; write for example 42=-1.5"
        ) from None


def with_sampling(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the parameter `sampling` of a command by the sampling options."""
    signature = inspect.signature(command, eval_str=True)
    options = inspect.signature(sampling_params, eval_str=True).parameters

    def run(**values: Any) -> None:
        chosen = {name: values.pop(name) for name in options}
        command(sampling=sampling_params(**chosen), **values)

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
