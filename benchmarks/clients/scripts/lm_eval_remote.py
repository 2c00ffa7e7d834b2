"""lm-eval: a model behind the API, with the server's own tokenizer."""

from features import MODEL, URL, check, feature
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI


def completions(**fields: object) -> LocalCompletionsAPI:
    """A model for completions."""
    return LocalCompletionsAPI(
        base_url=f"{URL}/completions", model=MODEL, max_length=512, max_retries=1, **fields
    )


def instance(kind: str, *arguments: object) -> Instance:
    """A request of a task."""
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


@feature("tokenizer_backend=remote: loglikelihood, generate_until")
def remote() -> None:
    model = completions(tokenizer_backend="remote")
    (_, greedy), *_ = model.loglikelihood([instance("loglikelihood", "One two", " three")])
    assert isinstance(greedy, bool)
    until = {"until": ["zz"], "max_gen_toks": 4}
    assert model.generate_until([instance("generate_until", "One two", until)])[0]


@feature("without a tokenizer: generate_until; chat completions")
def plain() -> None:
    until = {"until": ["zz"], "max_gen_toks": 4}
    model = completions(tokenizer_backend=None, tokenized_requests=False)
    assert model.generate_until([instance("generate_until", "One two", until)])[0]
    chat = LocalChatCompletion(
        base_url=f"{URL}/chat/completions", model=MODEL, max_retries=1, tokenizer_backend=None
    )
    said = chat.apply_chat_template([{"role": "user", "content": "One two"}])
    assert chat.generate_until([instance("generate_until", said, until)])[0]


check("lm_eval")
