"""From request bodies to engine requests: sampling parameters, tokenized prompts, ids and seeds."""

from typing import Any

from ..core.errors import ContextLengthError, InvalidRequestError
from ..core.pruning import PruneParams
from ..core.request import Grammar, Request, SamplingParams
from .generation import Job
from .grammars import asked_grammar
from .keys import short_hash
from .schemas import ChatBody, ChatMessage, CompletionBody, GenerationBody, PruneBody, TemplateOptions
from .settings import Service
from .text import Tokenizer

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default for completions."""
_SHARED = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
    "min_tokens",
    "ignore_eos",
    "n",
)


async def completion_jobs(service: Service, body: CompletionBody, response_id: str, key_tenant: str = "") -> list[Job]:
    """One engine request per prompt; choices are numbered through all prompts.

    key_tenant: whose API key the request came with.
    """
    echo = bool(body.echo)
    score_only = echo and body.max_tokens == 0  # one token must be generated: it is dropped
    wanted = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    params = _sampling(
        body,
        max_tokens=1 if score_only else wanted,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if echo else None,
    )
    grammar = await asked_grammar(body)
    jobs: list[Job] = []
    for number, prompt in enumerate(body.prompt):
        if isinstance(prompt, str):
            ids = await service.tokenizer.encode_async(prompt, body.add_special_tokens)
        else:
            ids = prompt
        shown = (prompt if isinstance(prompt, str) else service.tokenizer.decode(ids)) if echo else None
        request = _request(service, body, f"{response_id}-{number}", ids, params, grammar, key_tenant, param="prompt")
        jobs.append(_job(body, request, first_index=number * params.n, echo=shown, score_only=score_only))
    return jobs


async def chat_jobs(service: Service, body: ChatBody, response_id: str, key_tenant: str = "") -> list[Job]:
    """The one engine request of a conversation; `key_tenant` as for completions."""
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    wanted = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    params = _sampling(body, max_tokens=wanted, logprobs=(body.top_logprobs or 0) if body.logprobs else None)
    grammar = await asked_grammar(body)
    ids = await chat_ids(service.tokenizer, body.messages, body)
    if body.prune and body.prune.context_messages is not None:
        body = body.model_copy(update={"prune": await _with_context(service.tokenizer, body, body.prune, ids)})
    request = _request(service, body, response_id, ids, params, grammar, key_tenant, param="messages")
    return [_job(body, request, first_index=0, echo=None, score_only=False)]


async def _with_context(tokenizer: Tokenizer, body: ChatBody, prune: PruneBody, ids: list[int]) -> PruneBody:
    """How to prune the conversation's tokens `ids`, with the length of what its first messages are in them.

    A template may write messages otherwise when others follow: what counts is how far both agree.
    """
    count = prune.context_messages or 0
    if prune.context is not None or not 0 < count < len(body.messages):
        said = "prune.context_messages must be at least 1 and leave a message, and stand without prune.context"
        raise InvalidRequestError(f"{said}; the chat has {len(body.messages):,}", param="prune.context_messages")
    options = TemplateOptions(add_generation_prompt=False, chat_template_kwargs=body.chat_template_kwargs)
    leading = await chat_ids(tokenizer, body.messages[:count], options)
    ends = (place for place, pair in enumerate(zip(leading, ids, strict=False)) if pair[0] != pair[1])
    context = next(ends, min(len(leading), len(ids)))
    return prune.model_copy(update={"context": context, "context_messages": None})


async def chat_ids(
    tokenizer: Tokenizer, messages: list[ChatMessage], options: TemplateOptions, add_special_tokens: bool = False
) -> list[int]:
    """Tokens of a conversation, written by the model's template."""

    def write() -> str:
        return tokenizer.chat_prompt(
            [message.model_dump(exclude_none=True) for message in messages],
            add_generation_prompt=options.add_generation_prompt,
            continue_final_message=options.continue_final_message,
            template_kwargs=options.template_variables,
        )

    text = await tokenizer.run(sum(len(message.content) for message in messages), write)
    return await tokenizer.encode_async(text, add_special_tokens)


def _sampling(body: GenerationBody, **other: Any) -> SamplingParams:
    fields = {name: value for name in _SHARED if (value := getattr(body, name)) is not None}
    fields |= {name: value for name, value in other.items() if value is not None}
    return SamplingParams(stop_token_ids=tuple(body.stop_token_ids or ()), **fields)


def _request(
    service: Service,
    body: GenerationBody,
    request_id: str,
    ids: list[int],
    params: SamplingParams,
    grammar: Grammar | None,
    key_tenant: str,
    *,
    param: str,
) -> Request:
    if not ids:
        raise InvalidRequestError("the prompt is empty", param=param)
    if grammar is not None:
        service.metrics.bound(grammar.kind)
    limit, prune = service.max_model_len, _pruning(service, body)
    if limit is not None and prune is not None and prune.positions == "cache":
        limit = max(limit, service.max_stream_len)
    if limit is not None and len(ids) >= limit:  # the engine would say so too: this spares it the tokens
        raise ContextLengthError(
            f"the prompt has {len(ids):,} tokens but the model's context, one generated token included, holds at most "
            f"{limit:,} tokens",
            param=param,
        )
    return Request.create(
        request_id,
        ids,
        params,
        service.seeds,
        cache_salt=body.cache_salt or "",
        cache_ttl=body.cache_ttl or 0.0,
        prune=prune,
        repeat_ids=() if prune is None else service.tokenizer.repeat_ids,
        priority=body.priority or 0,
        tenant=key_tenant or (short_hash(body.user) if body.user else ""),
        timeout=body.timeout,
        speculate=body.speculate is not False,
        grammar=grammar,
        namespace=key_tenant if service.settings.isolate_keys else "",
    )


def _pruning(service: Service, body: GenerationBody) -> PruneParams | None:
    """What the body asks for, or the operator's default where it says nothing."""
    if "prune" not in body.model_fields_set:
        return service.settings.prune
    if not body.prune:
        return None
    params, least = body.prune.params(), service.settings.prune_min_keep
    if params.keep < least:
        raise InvalidRequestError(
            f"prune.keep must be at least {least:g} here, got {params.keep:g}", param="prune.keep"
        )
    if params.least_share < least:
        raise InvalidRequestError(
            f"the budget {params.budget!r} may keep less than {least:g} of the entries, which is the least here",
            param="prune.budget",
        )
    return params


def _job(body: GenerationBody, request: Request, *, first_index: int, echo: str | None, score_only: bool) -> Job:
    return Job(
        request=request,
        first_index=first_index,
        stops=tuple(body.stop),
        skip_special_tokens=body.skip_special_tokens,
        echo=echo,
        score_only=score_only,
    )
