"""What clients ask for, read and checked. Pure. The refusals and their words are vLLM's in kind."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from dynctl.errors import DynctlError, RequestError
from dynctl.mocker.blocks import Media
from dynctl.mocker.pictures import Picture, pictures, placed
from dynctl.mocker.tokens import Vocabulary

COMPLETION_TOKENS = 16
"""`max_tokens` of /v1/completions when the request gives none."""
MOST_CHOICES = 128


class ApiError(RequestError):
    """A refusal with its HTTP status, the type vLLM gives it and the field at fault."""

    def __init__(
        self, message: str, *, status: int = 400, kind: str = "BadRequestError", param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.api_type = kind
        self.param = param

    def body(self) -> bytes:
        """The error as vLLM's API shows it: an OpenAI error whose `code` is the status."""
        detail = {"message": self.message, "type": self.api_type, "param": self.param, "code": self.status}
        return msgspec.json.encode({"error": detail})


class StreamOptions(msgspec.Struct):
    """Of `stream_options`, what is acted on."""

    include_usage: bool | None = None


class _Common(msgspec.Struct, kw_only=True):
    model: str | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None
    cache_salt: str | None = None
    kv_transfer_params: dict[str, Any] | None = None


class CompletionBody(_Common, kw_only=True):
    """/v1/completions; `prompt`: text, token ids, or a list of either."""

    prompt: str | list[Any]


class ChatBody(_Common, kw_only=True):
    """/v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False


class TokenizeBody(msgspec.Struct, kw_only=True):
    """/tokenize."""

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False


@dataclass(frozen=True, slots=True)
class Generation:
    """A request that can be served. `max_tokens` fits into the context of every prompt.

    `adapter`: the LoRA adapter it names, "" = the model itself.
    """

    chat: bool
    prompts: tuple[list[int], ...]
    max_tokens: tuple[int, ...]
    min_tokens: int
    choices: int
    stop: tuple[str, ...]
    stream: bool
    usage: bool
    ignore_eos: bool
    token_ids: bool
    salt: str
    transfer: dict[str, Any] | None
    adapter: str = ""
    media: tuple[Media, ...] = ()


@dataclass(frozen=True, slots=True)
class Serving:
    """What requests are checked against. `adapters`: the LoRA adapters loaded now, and from where."""

    model: str
    vocabulary: Vocabulary
    max_model_len: int
    default_max_tokens: int
    adapters: dict[str, str] = field(default_factory=dict)


B = TypeVar("B")


def decode_body(body: bytes, kind: type[B]) -> B:
    """A body of that type. Raises ApiError 400 that names the field."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise ApiError(f"invalid request: {error}", param=_field_of(str(error))) from error
    except msgspec.DecodeError as error:
        raise ApiError(f"invalid JSON: {error}") from error


def parse_generation(body: bytes, chat: bool, serving: Serving) -> Generation:
    """A request of either endpoint. Raises ApiError: 400, or 404 for another model's name."""
    asked = decode_body(body, ChatBody) if chat else decode_body(body, CompletionBody)
    check_model(asked.model, serving)
    _check_numbers(asked)
    media: tuple[Media, ...] = ()
    if isinstance(asked, ChatBody):
        tokens, media = _chat_prompt(asked, serving.vocabulary)
        prompts: tuple[list[int], ...] = (tokens,)
        wanted = asked.max_completion_tokens if asked.max_completion_tokens is not None else asked.max_tokens
        default = serving.default_max_tokens
    else:
        prompts = _prompts(asked.prompt, serving.vocabulary)
        wanted = asked.max_tokens
        default = COMPLETION_TOKENS
    limits = tuple(_output_limit(len(prompt), wanted, default, serving.max_model_len) for prompt in prompts)
    minimum = asked.min_tokens or 0
    if wanted is not None and minimum > wanted:
        raise ApiError(f"min_tokens must be at most max_tokens={wanted}, got {minimum}.", param="min_tokens")
    stop = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ())
    return Generation(
        chat=chat,
        prompts=prompts,
        max_tokens=limits,
        min_tokens=minimum,
        choices=asked.n or 1,
        stop=tuple(text for text in stop if text),
        stream=bool(asked.stream),
        usage=bool(asked.stream_options and asked.stream_options.include_usage),
        ignore_eos=bool(asked.ignore_eos),
        token_ids=bool(asked.return_token_ids),
        salt=asked.cache_salt or "",
        transfer=asked.kv_transfer_params,
        adapter=asked.model if asked.model and asked.model in serving.adapters else "",
        media=media,
    )


def check_model(name: str | None, serving: Serving) -> None:
    """Raises ApiError 404 for a model that is not served; no name means the one there is."""
    if name and name != serving.model and name not in serving.adapters:
        raise ApiError(f"The model `{name}` does not exist.", status=404, kind="NotFoundError", param="model")


def chat_tokens(
    messages: list[dict[str, Any]], vocabulary: Vocabulary, *, generate: bool, resume: bool
) -> list[int]:
    """A chat's prompt. Raises ApiError 400."""
    if not messages:
        raise ApiError("messages must not be empty", param="messages")
    if generate and resume:
        raise ApiError("Cannot set both `continue_final_message` and `add_generation_prompt` to True.")
    try:
        text = vocabulary.render(messages, generate=generate, resume=resume)
    except DynctlError as error:
        raise ApiError(str(error), param="messages") from error
    return vocabulary.encode(text, special=False)


def _chat_prompt(asked: ChatBody, vocabulary: Vocabulary) -> tuple[list[int], tuple[Media, ...]]:
    given = (asked.kv_transfer_params or {}).get("prompt_token_ids")
    if given:
        return _checked_ids(given, vocabulary), ()
    tokens = chat_tokens(
        asked.messages,
        vocabulary,
        generate=asked.add_generation_prompt,
        resume=asked.continue_final_message,
    )
    if vocabulary.image_token is None:
        return tokens, ()
    shown: list[Picture] = pictures(asked.messages)
    if tokens.count(vocabulary.image_token) != len(shown):
        raise ApiError("the prompt has other placeholders than there are images", param="messages")
    return placed(tokens, vocabulary.image_token, shown)


def _prompts(prompt: str | list[Any], vocabulary: Vocabulary) -> tuple[list[int], ...]:
    if isinstance(prompt, str):
        parts: list[Any] = [prompt]
    elif prompt and isinstance(prompt[0], int):
        parts = [prompt]
    else:
        parts = prompt
    encoded = [
        vocabulary.encode(part) if isinstance(part, str) else _checked_ids(part, vocabulary) for part in parts
    ]
    if not encoded or not all(encoded):
        raise ApiError("The prompt must not be empty", param="prompt")
    return tuple(encoded)


def _checked_ids(tokens: object, vocabulary: Vocabulary) -> list[int]:
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise ApiError("a prompt is text, a list of token ids, or a list of these", param="prompt")
    if tokens and (max(tokens) >= vocabulary.size or min(tokens) < 0):
        raise ApiError(f"Token id {max(tokens)} is out of vocabulary", param="prompt")
    return tokens


def _check_numbers(asked: _Common) -> None:
    if asked.stream_options is not None and not asked.stream:
        raise ApiError("Stream options can only be defined when `stream=True`.", param="stream_options")
    if asked.temperature is not None and asked.temperature < 0:
        raise ApiError(f"temperature must be non-negative, got {asked.temperature}.", param="temperature")
    if asked.n is not None and not 1 <= asked.n <= MOST_CHOICES:
        raise ApiError(f"n must be 1 to {MOST_CHOICES}, got {asked.n}.", param="n")
    if asked.min_tokens is not None and asked.min_tokens < 0:
        raise ApiError(f"min_tokens must not be negative, got {asked.min_tokens}.", param="min_tokens")


def _output_limit(prompt: int, wanted: int | None, default: int, context: int) -> int:
    """Tokens to say at most. Raises ApiError 400 when the prompt, or prompt and `wanted`, do not fit."""
    if wanted is not None and wanted < 1:
        raise ApiError(f"max_tokens must be at least 1, got {wanted}.", param="max_tokens")
    least = wanted or 1
    if prompt + least > context:
        raise ApiError(
            f"This model's maximum context length is {context} tokens. However, you requested {least} output "
            f"tokens and your prompt contains at least {prompt} input tokens, for a total of at least "
            f"{prompt + least} tokens. Please reduce the length of the input prompt or the number of "
            "requested output tokens.",
            param="input_tokens",
        )
    return wanted or min(default, context - prompt)


def _field_of(message: str) -> str | None:
    """The field in msgspec's "... - at `$.a.b`"; for a missing one the name it gives."""
    _, found, path = message.partition("at `$.")
    if found:
        return path.rstrip("`")
    _, found, rest = message.partition("missing required field `")
    return rest.rstrip("`") if found else None
