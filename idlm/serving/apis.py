"""Routes of the two other APIs that clients speak: OpenAI's responses and Anthropic's messages.

Both are translations: a request becomes a chat request, and the chat answer becomes theirs.
"""

from __future__ import annotations

from fastapi import Request, Response

from idlm.serving.answer_messages import MessagesAnswer
from idlm.serving.answer_responses import ResponsesAnswer
from idlm.serving.bodies_messages import EVENTS as MESSAGES_EVENTS
from idlm.serving.bodies_messages import MessageObject, TokenCount
from idlm.serving.bodies_responses import EVENTS as RESPONSES_EVENTS
from idlm.serving.bodies_responses import ResponseObject
from idlm.serving.chat import chat_answer
from idlm.serving.document import READS, RUNS, answers, strict_router
from idlm.serving.errors import MESSAGES_PATH, ApiError, MessagesError
from idlm.serving.jobs import the_server
from idlm.serving.schema_messages import CountRequest, MessagesRequest
from idlm.serving.schema_responses import NAMES, ResponsesRequest
from idlm.serving.schema_translated import renamed
from idlm.serving.sending import as_json, respond

SHAPES = (
    *(ResponseObject, *RESPONSES_EVENTS),
    *(MessageObject, TokenCount, MessagesError, *MESSAGES_EVENTS),
)
"""Every type of a response body."""
router = strict_router()


@router.post(
    "/v1/responses", responses=answers(ResponseObject, *READS, *RUNS, events=RESPONSES_EVENTS)
)
async def create_response(request: Request, body: ResponsesRequest) -> Response:
    """Answer a conversation in the form of OpenAI's responses, as one body or as a stream."""
    with renamed(NAMES):
        chat = await chat_answer(request, body.to_chat())
        return await respond(request, ResponsesAnswer(chat, body), bool(body.stream))


@router.api_route(
    "/v1/responses/{id:path}", methods=["GET", "POST", "DELETE"], include_in_schema=False
)
async def stored_response(id: str) -> Response:
    """404: nothing is stored."""
    raise ApiError(
        404,
        f"response {id[:80]!r}: this server stores no responses; keep what it answers, and send "
        "the whole conversation as input of POST /v1/responses",
        code="response_not_stored",
    )


@router.post(
    MESSAGES_PATH,
    responses=answers(
        MessageObject, *READS, *RUNS, events=(*MESSAGES_EVENTS, MessagesError), error=MessagesError
    ),
)
async def create_message(request: Request, body: MessagesRequest) -> Response:
    """Answer a conversation in the form of Anthropic's messages, as one body or as a stream."""
    chat = await chat_answer(request, body.to_chat())
    return await respond(request, MessagesAnswer(chat), bool(body.stream))


@router.post(
    f"{MESSAGES_PATH}/count_tokens",
    responses=answers(TokenCount, *READS, 404, error=MessagesError),
)
async def count_tokens(request: Request, body: CountRequest) -> Response:
    """The number of tokens that a message's prompt would have."""
    server = the_server(request)
    server.target(body.model)
    ids = await server.prompts.in_thread(body.to_chat().encoder(server.prompts))
    return as_json(TokenCount(len(ids)))
