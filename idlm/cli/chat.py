"""`idlm chat MODEL`, `idlm chat --url URL`: talk to a model."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from idlm.cli import common, drafts
from idlm.cli.sampling import Sampling, with_sampling
from idlm.errors import InputError
from idlm.extras import need

if TYPE_CHECKING:
    from idlm.ui.backend import ChatBackend

KEY_VARIABLES = ("IDLM_API_KEY", "OPENAI_API_KEY")


@with_sampling
def chat(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A folder, a GGUF file, a hub id, or a bundled model: nano, nano-base, nano-full.",
        ),
    ] = None,
    *,
    adapter: common.Adapter = None,
    stride: drafts.Stride = None,
    branches: drafts.Branches = None,
    draft_source: drafts.Source = None,
    dtype: common.Dtype = "auto",
    device: common.Device = "cpu",
    max_model_len: common.MaxModelLen = None,
    weights: common.Weights = "auto",
    threads: common.Threads = None,
    url: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Talk to a server with OpenAI's API: http://host:port/v1."
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="The model's name at the URL.")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(help=f"The server's key. Or ${KEY_VARIABLES[0]}, ${KEY_VARIABLES[1]}."),
    ] = None,
    colors: Annotated[bool, typer.Option(help="Colour tokens by where they came from.")] = False,
    sampling: Sampling,
) -> None:
    """Talk to a model: one in this process, or one of a server."""
    if (model is None) == (url is None):
        raise InputError("idlm chat takes a MODEL or a --url; give one of them")
    if url is None and name is not None:
        raise InputError(f"--model {name!r} is for --url; a model of this machine needs no option")
    if url is not None and adapter is not None:
        raise InputError(
            f"--adapter {adapter!r} with --url; a server's adapters are models: --model NAME"
        )
    if url is not None and sampling.generation_config != "auto":
        raise InputError(
            f"--generation-config {sampling.generation_config} with --url; "
            "a server has its own defaults: give it to idlm serve"
        )
    if sampling.plain.n != 1:
        raise InputError(f"--n {sampling.plain.n}: a chat has one answer; leave the option out")

    from idlm.ui.chat import Chat, reader

    backend: ChatBackend
    if url is not None:
        need("chat", "idlm chat --url")
        from idlm.ui.chat_remote import RemoteBackend

        backend = RemoteBackend(url, _key(api_key), name, sampling.given)
    else:
        from idlm.engine.llm import LLM
        from idlm.models.loading import load
        from idlm.ui.chat_local import LocalBackend

        wanted = drafts.Drafts(stride, branches, draft_source)
        config = wanted.config(
            max_model_len=max_model_len,
            max_num_seqs=1,
            weights=weights,
            threads=threads,
            generation_config=sampling.generation_config,
        )
        folders = [] if adapter is None else [adapter]
        config, ordinary = drafts.checked(wanted, config, str(model), folders, dtype, device)
        idlm = load(str(model), adapter, dtype, device, max_model_len)
        backend = LocalBackend(LLM(idlm, config=config), sampling.of(idlm))
        if ordinary:
            drafts.say_lookup(str(model))
    Chat(backend, colors).run(reader())


def _key(option: str | None) -> str | None:
    return option or next(
        (os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), None
    )
