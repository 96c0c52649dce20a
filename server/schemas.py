"""The request bodies of the API, in one place. Types are strict: true is no number and "5" is not 5.

Ranges of sampling parameters are checked once, by `SamplingParams`, but for those that have another name there. Unknown
fields are ignored, as OpenAI-compatible servers do; fields that are known but not supported, at all (`UNSUPPORTED`) or
at this endpoint, are refused when they ask for something.
"""

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
)

from ..core.errors import InvalidRequestError
from ..core.pruning import Budget, Positions, PruneParams, Refinement
from ..core.request import MAX_CACHE_SALT, MAX_LOGIT_BIAS, MAX_TOP_LOGPROBS
from .errors import invalid_request
from .grammars import StructuredBody

MAX_PROMPTS = 1024
MAX_MESSAGES = 4096
MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_TOKEN_ID = 2**31 - 1

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": ([],),
    "audio": (),
    "bad_words": ([],),
    "chat_template": (),
    "documents": ([],),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "grammar": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logit_processors": ([],),
    "logits_processors": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "prompt_embeds": ([],),
    "prompt_logprobs": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Field -> the values beside null with which it asks for nothing."""

Int32 = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
CacheSalt = Annotated[str, Field(max_length=MAX_CACHE_SALT)]
Int64 = Annotated[int, Field(ge=-(2**63), le=2**64 - 1)]


def token_ids(value: Any) -> list[int]:
    """Check a list of token ids without one error object per element. Raises ValueError."""
    if not isinstance(value, list) or set(map(type, value)) - {int}:
        raise ValueError("token ids must be a list of integers")
    if value and not 0 <= min(value) <= max(value) <= MAX_TOKEN_ID:
        raise ValueError(f"token ids must be between 0 and {MAX_TOKEN_ID}")
    return value


def _prompts(value: Any) -> list[str | list[int]]:
    """All four forms of `prompt` as a list of texts and token lists."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError("a prompt is a string, a list of token ids, or a non-empty list of either")
    if isinstance(value[0], int):
        return [token_ids(value)]
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"at most {MAX_PROMPTS} prompts are allowed, got {len(value)}")
    return [prompt if isinstance(prompt, str) else token_ids(prompt) for prompt in value]


def _stops(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value or []
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("stop is a string or a list of strings")
    if len(stops) > MAX_STOPS or any(not 0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise ValueError(f"at most {MAX_STOPS} stop strings of 1 to {MAX_STOP_CHARS} characters are allowed")
    return stops


def _content(value: Any, info: ValidationInfo) -> str:
    """The text of a message: a string, text parts (joined by line breaks), or nothing, of the assistant alone."""
    if value is None and info.data.get("role", "assistant") != "assistant":
        raise ValueError(f"a message of the role {info.data['role']} needs content")
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise ValueError("content is a string or a list of text parts")
    texts: list[str] = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise ValueError(f"only content parts of type text are supported, got {str(kind)[:50]}")
        if not isinstance(part.get("text"), str):
            raise ValueError("the text of a content part must be a string")
        texts.append(part["text"])
    return "\n".join(texts)


def _logit_bias(value: Any) -> Any:
    """JSON's string keys as token ids."""
    if not isinstance(value, dict):
        return value
    if len(value) > MAX_LOGIT_BIAS:  # before each bad entry costs an error object
        raise ValueError(f"at most {MAX_LOGIT_BIAS} biased tokens are allowed")
    try:
        biases = {int(key): bias for key, bias in value.items()}
    except ValueError as error:
        raise ValueError("the keys of logit_bias must be token ids") from error
    token_ids(list(biases))
    return biases


_TOKENS_SCHEMA = {"type": "array", "items": {"type": "integer"}}
_STRINGS_SCHEMA = {"type": "array", "items": {"type": "string"}}
TokenIds = Annotated[list[int], PlainValidator(token_ids), WithJsonSchema(_TOKENS_SCHEMA)]
Prompts = Annotated[
    list[str | list[int]],
    PlainValidator(_prompts),
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, _STRINGS_SCHEMA, _TOKENS_SCHEMA, {"type": "array", "items": _TOKENS_SCHEMA}]}
    ),
]
Stops = Annotated[list[str], PlainValidator(_stops), WithJsonSchema({"anyOf": [{"type": "string"}, _STRINGS_SCHEMA]})]
Content = Annotated[
    str,
    PlainValidator(_content),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}, {"type": "null"}]}),
]
LogitBias = Annotated[dict[Int32, float], BeforeValidator(_logit_bias)]


class Body(BaseModel):
    """Base of all request bodies."""

    model_config = ConfigDict(strict=True, extra="ignore")

    model: str | None = None
    """A served model's name; the first one if absent."""


class StreamOptions(BaseModel):
    """OpenAI's `stream_options`."""

    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool = False
    """Send a last chunk with the usage and no choices."""
    continuous_usage_stats: bool = False
    """With `include_usage`: every chunk tells the usage so far (vLLM's extension)."""


class PruneBody(BaseModel):
    """How a request's sequences may forget. None stands for the default of `PruneParams`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    policy: str
    keep: float | None = None
    floor: Int32 | None = None
    window: Int32 | None = None
    sinks: Int32 | None = None
    budget: Budget | None = None
    threshold: float | None = None
    refine: list[Refinement] | None = None
    chunked: bool | None = None
    context: Int32 | None = None
    context_messages: Int32 | None = None
    """Of a chat: how many leading messages are the `context`; fewer than all."""
    every: Int32 | None = None
    when: Literal["always", "pressure"] | None = None
    positions: Positions | None = None

    def params(self) -> PruneParams:
        """Raises `InvalidRequestError` for what is out of range."""
        if self.context_messages is not None:
            raise InvalidRequestError(
                "prune.context_messages counts messages of a chat: elsewhere prune.context counts tokens",
                param="prune.context_messages",
            )
        fields = self.model_dump(exclude_none=True)
        return PruneParams(**fields | {"refine": tuple(fields.get("refine", ()))})


def _prune(value: Any) -> Any:
    """False says the same as null."""
    if value is not None and value is not False and not isinstance(value, dict):
        raise ValueError('an object such as {"policy": "keydiff", "keep": 0.5}, or false, is wanted')
    return None if value is False else value


Pruning = Annotated[PruneBody | None, BeforeValidator(_prune)]


class GenerationBody(Body, StructuredBody):
    """What completions and chat completions share. None stands for the default of `SamplingParams`."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: Int32 | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: LogitBias | None = None
    seed: Int64 | None = None
    stop: Stops = []
    stop_token_ids: TokenIds | None = None
    min_tokens: Int32 | None = None
    ignore_eos: bool | None = None
    n: Int32 | None = None
    best_of: Int32 | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    skip_special_tokens: bool = True
    user: str | None = None
    cache_salt: CacheSalt | None = None
    """Only requests of equal salt reuse each other's computed prefixes."""
    cache_ttl: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Seconds for which the prompt's computed blocks stay cached after the request; the operator sets a limit."""
    prune: Pruning = None
    """How the KV cache of this request is pruned; false or null: not at all; absent: as the server is set up."""
    speculate: bool | None = None
    """Whether tokens may be drafted, where the server has a drafter; true if absent. Answers stay the model's own."""
    priority: Int32 | None = None
    """Lower is sooner; counts where the server serves by priority."""
    timeout: float | None = None
    """Seconds after which the request fails if it has not ended."""


class CompletionBody(GenerationBody):
    """`POST /v1/completions`."""

    prompt: Prompts
    max_tokens: Int32 | None = None
    """None: 16, as OpenAI has it. 0 together with `echo` scores the prompt and generates nothing."""
    echo: bool | None = None
    logprobs: Int32 | None = None
    """How many of the most likely tokens to report for each token."""
    add_special_tokens: bool = True


class ChatMessage(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(strict=True, extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = Field(None, validate_default=True)
    name: str | None = None
    tool_call_id: str | None = None


class TemplateOptions(BaseModel):
    """How a conversation becomes a prompt."""

    model_config = ConfigDict(strict=True, extra="ignore")

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    """Given to the template, for models whose template asks for it."""

    @property
    def template_variables(self) -> dict[str, Any]:
        """What the request adds to the template's variables."""
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return effort | (self.chat_template_kwargs or {})


class ChatBody(GenerationBody, TemplateOptions):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: Int32 | None = None
    """None: to the end of the context."""
    max_completion_tokens: Int32 | None = Field(None, ge=1)
    """The newer name of `max_tokens`; wins over it."""
    logprobs: bool | None = None
    top_logprobs: Int32 | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)


class TokenizeBody(Body, TemplateOptions):
    """`POST /tokenize`: either a prompt or messages."""

    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    add_special_tokens: bool | None = None
    """None: for a prompt yes, for messages no (their template writes them)."""
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    """`POST /detokenize`."""

    tokens: TokenIds


class DraftBody(Body):
    """`POST /draft`."""

    draft: str = Field(min_length=1)
    """Folder of a draft model, on the server; `ngram`: n-grams draft alone again."""


AnyBody = TypeVar("AnyBody", bound=Body)


def parse_body(kind: type[AnyBody], raw: bytes) -> AnyBody:
    """A request body as `kind`. Raises `InvalidRequestError`, naming the field at fault."""
    try:
        data = msgspec.json.decode(raw)
    except RecursionError as error:
        raise InvalidRequestError("the JSON body is nested too deeply") from error
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise InvalidRequestError(f"the body is not valid JSON: {str(error)[:200]}") from error
    if not isinstance(data, dict):
        raise InvalidRequestError("the body must be a JSON object")
    _refuse_unsupported(kind, data)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise invalid_request(error) from error


def _refuse_unsupported(kind: type[Body], data: dict[str, Any]) -> None:
    for name in sorted(data.keys() & _elsewhere(kind)):
        if data[name] is not None and data[name] is not False:
            raise InvalidRequestError(f"{name} is no parameter of this endpoint", param=name)
    for name in sorted(data.keys() & UNSUPPORTED.keys()):
        if data[name] is not None and data[name] not in UNSUPPORTED[name]:
            raise InvalidRequestError(f"{name} is not supported", param=name)
    best_of = data.get("best_of")
    if best_of is not None and best_of != (data.get("n") or 1):
        raise InvalidRequestError("best_of other than n is not supported", param="best_of")
    messages = data.get("messages")
    for number, message in enumerate(messages if isinstance(messages, list) else ()):
        for name in ("tool_calls", "function_call"):
            if isinstance(message, dict) and message.get(name):
                raise InvalidRequestError(f"{name} is not supported", param=f"messages.{number}.{name}")


def _elsewhere(kind: type[Body]) -> set[str]:
    """Parameters of the other of the two endpoints that generate: ignored, they would change the answer unnoticed."""
    others: dict[type[Body], type[Body]] = {CompletionBody: ChatBody, ChatBody: CompletionBody}
    return others[kind].model_fields.keys() - kind.model_fields.keys() if kind in others else set()
