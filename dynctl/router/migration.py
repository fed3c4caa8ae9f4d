"""Going on with an answer that a lost worker had begun: what was said, and the request for the rest. Pure.

`Said` reads the server-sent events a client was sent, over all legs of a stream. `continuation` makes of the
request and of what was said the request another worker gets. Where the rest could not be right (several
choices, guided decoding, a tool call or reasoning begun) `CannotContinue` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import msgspec

from dynctl.engines.base import Continuation
from dynctl.protocol.sse import DONE, event_data, split_events

Json = dict[str, Any]
Kind = Literal["chat", "completions"]
Encode = Callable[[str], Sequence[int] | None]
"""The tokens of a text; None = not known here."""

_GUIDED = (
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "structured_outputs",
    "structural_tag",
    "json_schema",
    "regex",
    "ebnf",
)
_OTHER_PROMPT = ("echo", "prompt_logprobs", "prompt_embeds", "truncate_prompt_tokens", "suffix", "input_ids")
_HEAD = ("id", "object", "created", "model")
_REASONING = ("reasoning_content", "reasoning")


class CannotContinue(Exception):
    """The rest of this answer cannot be had from another worker; the message says why, for the client."""


class Said:
    """What one stream has told its client. `feed` takes payload bytes, `take` one decoded chunk.

    `head`: what names the first chunk. `tokens`: the ids of what was said, None as
    soon as a chunk with text did not carry them. `lags`: tokens were told whose text was not.
    """

    __slots__ = (
        "_pending",
        "_texts",
        "chunks",
        "done",
        "finish",
        "head",
        "lags",
        "lasting",
        "prompt_ids",
        "reasoning",
        "role",
        "several",
        "spoken",
        "tokens",
        "tools",
        "usage",
    )

    def __init__(self) -> None:
        self.head: Json = {}
        self.role = self.reasoning = self.tools = self.several = self.done = self.lags = False
        self.lasting = True
        self.finish = ""
        self.chunks = self.spoken = 0
        self.tokens: list[int] | None = []
        self.prompt_ids: list[int] | None = None
        self.usage: tuple[int, int] | None = None
        self._texts: list[str] = []
        self._pending = b""

    @property
    def text(self) -> str:
        """All text, joined."""
        if len(self._texts) > 1:
            self._texts = ["".join(self._texts)]
        return self._texts[0] if self._texts else ""

    def feed(self, payload: bytes) -> None:
        """Take server-sent events, without chunk framing; half an event at the end waits for its rest."""
        events, self._pending = split_events(self._pending + payload)
        for event in events:
            data = event_data(event)
            if data == DONE:
                self.done = True
            elif data:
                self._decode(data)

    def _decode(self, data: bytes) -> None:
        try:
            chunk = msgspec.json.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError):
            chunk = None
        if isinstance(chunk, dict):
            self.take(chunk)
        else:
            self.lasting = False

    def take(self, chunk: Json) -> None:
        """Take one chunk the client was sent. One of unknown shape makes `lasting` false."""
        try:
            self._take(chunk)
        except (KeyError, TypeError, AttributeError, ValueError):
            self.lasting = False

    def _take(self, chunk: Json) -> None:
        if not self.head:
            self.head = {name: chunk[name] for name in _HEAD if name in chunk}
        usage = chunk.get("usage")
        if usage:
            self.usage = (int(usage["prompt_tokens"]), int(usage.get("completion_tokens") or 0))
        self.prompt_ids = chunk.get("prompt_token_ids") or self.prompt_ids
        for choice in chunk.get("choices") or ():
            self._choice(choice)

    def _choice(self, choice: Json) -> None:
        delta = choice.get("delta") or {}
        self.several |= bool(choice.get("index"))
        self.role |= bool(delta.get("role"))
        self.tools |= bool(delta.get("tool_calls") or delta.get("function_call"))
        self.reasoning |= any(delta.get(name) for name in _REASONING)
        self.prompt_ids = choice.get("prompt_token_ids") or self.prompt_ids
        text = delta.get("content") if delta else choice.get("text")
        ids = choice.get("token_ids")
        if text:
            self._texts.append(text + "")
            self.spoken += 1
        if self.tokens is not None and ids:
            self.tokens.extend(ids)
            self.lags = not text
        elif text:
            self.tokens = None
        self.finish = choice.get("finish_reason") or self.finish


def spoken_tokens(kind: Kind, request: Json, said: Said, encode: Encode) -> int:
    """How many tokens were said: their ids, the engine's own count, ours of the text, or one a chunk.

    Without those that the next leg says again: a chat's white space at the end, and what the engine had made
    but held back, since it might have been the beginning of a stop string.
    """
    text = said.text
    again = text[len(text.rstrip()) :] if kind == "chat" and not said.finish else ""
    if said.tokens:
        return len(said.tokens)
    whole, kept = encode(text), encode(text[: len(text) - len(again)])
    if whole is None or kept is None:
        counted, counted_again = said.spoken, said.spoken - bool(again)
    else:
        counted, counted_again = len(whole), len(kept)
    told = counted if said.usage is None or holds_back(request) else said.usage[1]
    return max(0, told - (counted - counted_again))


def continuation(
    kind: Kind, request: Json, said: Said, spoken: int, dialect: Continuation, encode: Encode
) -> Json:
    """The request for the rest; {} when all that was asked for has been said. `spoken` is in tokens.

    `request` values may be `msgspec.Raw`. Raises CannotContinue.
    """
    _check_single(request, said)
    if said.finish:
        return {}
    _check(request, said)
    rest = _budget(kind, request, spoken, dialect)
    if rest is None:
        return {}
    if kind == "chat":
        rest.update(_chat(request, said, dialect))
    else:
        rest["prompt"] = _prompt(request.get("prompt"), said, encode)
    return {**request, **rest}


def _check_single(request: Json, said: Said) -> None:
    """Raises CannotContinue for an answer of several choices, of which one may have ended."""
    for name in ("n", "best_of"):
        if (_plain(request.get(name)) or 1) != 1:
            raise CannotContinue(f"`{name}` asks for several answers")
    if _plain(request.get("use_beam_search")):
        raise CannotContinue("beam search")
    if said.several:
        raise CannotContinue("several answers were begun")


def _check(request: Json, said: Said) -> None:
    """Raises CannotContinue for what no second worker could go on with rightly."""
    form = _plain(request.get("response_format"))
    if isinstance(form, dict) and form.get("type") != "text":
        raise CannotContinue("`response_format` binds the answer from its first token on")
    for name in (*_GUIDED, *_OTHER_PROMPT):
        if _plain(request.get(name)) not in (None, False, "", 0):
            raise CannotContinue(f"`{name}` is for an answer made in one piece")
    if _plain(request.get("tool_choice")) not in (None, "auto", "none"):
        raise CannotContinue("`tool_choice` binds the answer from its first token on")
    if not said.lasting:
        raise CannotContinue("what was said is in no form known here")
    if said.tools:
        raise CannotContinue("a tool call was begun")
    if said.reasoning:
        raise CannotContinue("reasoning was begun")
    if said.tokens and "messages" in request and said.text != said.text.rstrip():
        raise CannotContinue("token ids of white space were told that the chat template would trim away")
    if said.tokens and (said.lags or holds_back(request)):
        raise CannotContinue("token ids were told whose text was held back")


def _budget(kind: Kind, request: Json, spoken: int, dialect: Continuation) -> Json | None:
    """The limits on the rest's tokens; None when none are left."""
    rest: Json = {}
    limits: Json = {name: _plain(request.get(name)) for name in ("max_completion_tokens", "max_tokens")}
    if kind == "completions" and "max_tokens" not in request:
        limits["max_tokens"] = dialect.completion_tokens
    for name, limit in limits.items():
        if limit is not None:
            if limit <= spoken:
                return None
            rest[name] = limit - spoken
    least = _plain(request.get("min_tokens"))
    if least:
        rest["min_tokens"] = max(0, least - spoken)
    return rest


def _chat(request: Json, said: Said, dialect: Continuation) -> Json:
    """The messages with what was said as the last one's beginning.

    White space at the end is left to be said again (and dropped where it meets what was said): templates trim
    it away. Nothing but white space: the request is made again as it was.
    """
    goes_on = bool(_plain(request.get("continue_final_message")))
    if _plain(request.get("add_generation_prompt")) is False and not goes_on:
        raise CannotContinue("`add_generation_prompt` is false")
    spoken = said.text.rstrip()
    if not spoken:
        return {}
    if dialect.chat is None:
        raise CannotContinue("the engine cannot continue a chat message")
    messages = _plain(request["messages"])
    if not goes_on:
        return {"messages": [*messages, {"role": "assistant", "content": spoken}], **dialect.chat}
    last = dict(messages[-1])
    if not isinstance(last.get("content"), str):
        raise CannotContinue("the message to be continued is not plain text")
    last["content"] += spoken
    return {"messages": [*messages[:-1], last], **dialect.chat}


def _prompt(given: Any, said: Said, encode: Encode) -> Any:
    """The prompt with what was said behind it: by the very token ids where all are known, else by text.

    A prompt of token ids takes the text's tokens: not always those that were said, but the same text.
    """
    prompt = _plain(given)
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        prompt = prompt[0]
    numbers = isinstance(prompt, list) and all(isinstance(token, int) for token in prompt)
    ids = prompt if numbers else said.prompt_ids
    if said.tokens is not None and ids:
        return [*ids, *said.tokens]
    if isinstance(prompt, str):
        return prompt + said.text
    tokens = encode(said.text) if numbers and prompt else None
    if tokens is None:
        raise CannotContinue("the prompt is not one text, and the tokens said are not known")
    return [*prompt, *tokens]


def stops_of(request: Mapping[str, Any]) -> tuple[str, ...]:
    """The stop strings a request names."""
    stop = _plain(request.get("stop"))
    given = [stop] if isinstance(stop, str) else stop if isinstance(stop, list) else []
    return tuple(text for text in given if isinstance(text, str) and text)


def holds_back(request: Mapping[str, Any]) -> bool:
    """Whether the engine keeps text back that may be the beginning of a stop string."""
    return bool(stops_of(request)) and not _plain(request.get("include_stop_str_in_output"))


def _plain(value: Any) -> Any:
    """A request's value, decoded."""
    return msgspec.json.decode(value) if isinstance(value, msgspec.Raw) else value
