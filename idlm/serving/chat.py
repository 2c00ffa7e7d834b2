"""From a chat request to the answer that is being made: the one path of every chat API."""

from __future__ import annotations

from fastapi import Request

from idlm.serving.answers import ChatAnswer
from idlm.serving.jobs import admit, the_server
from idlm.serving.schema_chat import ChatRequest
from idlm.serving.tools import family_of


async def chat_answer(request: Request, body: ChatRequest) -> ChatAnswer:
    """Check a conversation, encode it and submit it to the engine.

    Raises:
        ApiError, InputError: it cannot be run. Busy, EngineDown: it cannot be run now.
    """
    server = the_server(request)
    server.accept(body)
    family = family_of(server.prompts.template_for(tools=True)) if body.tools_in_use else None
    ids = await server.prompts.in_thread(body.encoder(server.prompts))
    if family is not None and family.special:
        body = body.model_copy(update={"skip_special_tokens": False})
    job = admit(request, body, [ids])
    return ChatAnswer(job, body, server.prompts, family)
