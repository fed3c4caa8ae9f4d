"""Going on with an answer that a lost worker had begun: what was said, and the request for the rest. Pure.

`continuation` makes of the request and of what was said the request another worker gets: a completion goes on
from prompt and text, a chat as its last message; `retell` is for chats that cannot. Where the rest could not
be right (several choices, guided decoding, a tool call begun) `CannotContinue` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import msgspec

from dynctl.engines.base import Continuation
from dynctl.router.said import Json, Said

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

_LONGEST_WORD = 64


class CannotContinue(Exception):
    """The rest of this answer cannot be had from another worker; the message says why, for the client."""


def continuation(
    kind: Kind, request: Json, said: Said, spoken: int, dialect: Continuation, encode: Encode
) -> Json:
    """The request for the rest; {} when all that was asked for has been said. `spoken` is in tokens.

    It goes on from the text's `whole_words`. `request` values may be `msgspec.Raw`. Raises CannotContinue.
    """
    if said.finish:
        _check_single(request, said)
        return {}
    check(request, said)
    _check_tokens(request, said)
    rest = budget(kind, request, spoken, dialect)
    if rest is None:
        return {}
    text = said.text[: whole_words(request, said, dialect)]
    if kind == "chat":
        rest.update(_chat(request, text, dialect))
    else:
        rest["prompt"] = _prompt(request.get("prompt"), said, text, encode)
    return {**request, **rest}


def _check_single(request: Json, said: Said) -> None:
    """Raises CannotContinue for an answer of several choices, of which one may have ended."""
    for name in ("n", "best_of"):
        if (plain(request.get(name)) or 1) != 1:
            raise CannotContinue(f"`{name}` asks for several answers")
    if plain(request.get("use_beam_search")):
        raise CannotContinue("beam search")
    if said.several:
        raise CannotContinue("several answers were begun")


def check(request: Json, said: Said) -> None:
    """Raises CannotContinue for what no second worker could go on with rightly."""
    _check_single(request, said)
    form = plain(request.get("response_format"))
    if isinstance(form, dict) and form.get("type") != "text":
        raise CannotContinue("`response_format` binds the answer from its first token on")
    for name in (*_GUIDED, *_OTHER_PROMPT):
        if plain(request.get(name)) not in (None, False, "", 0):
            raise CannotContinue(f"`{name}` is for an answer made in one piece")
    if plain(request.get("tool_choice")) not in (None, "auto", "none"):
        raise CannotContinue("`tool_choice` binds the answer from its first token on")
    if not said.lasting:
        raise CannotContinue("what was said is in no form known here")
    if said.tools:
        raise CannotContinue("a tool call was begun")


def _check_tokens(request: Json, said: Said) -> None:
    """Raises CannotContinue for tokens told whose text the client would never see, or see twice."""
    if said.tokens and "messages" in request and said.text != said.text.rstrip():
        raise CannotContinue("token ids of white space were told that the chat template would trim away")
    if said.tokens and (said.lags or holds_back(request)):
        raise CannotContinue("token ids were told whose text was held back")


def budget(kind: Kind, request: Json, spoken: int, dialect: Continuation) -> Json | None:
    """The limits on the rest's tokens; None when none are left."""
    rest: Json = {}
    limits: Json = {name: plain(request.get(name)) for name in ("max_completion_tokens", "max_tokens")}
    if kind == "completions" and "max_tokens" not in request:
        limits["max_tokens"] = dialect.completion_tokens
    for name, limit in limits.items():
        if limit is not None:
            if limit <= spoken:
                return None
            rest[name] = limit - spoken
    least = plain(request.get("min_tokens"))
    if least:
        rest["min_tokens"] = max(0, least - spoken)
    return rest


def _chat(request: Json, text: str, dialect: Continuation) -> Json:
    """The messages with what was said as the last one's beginning.

    White space at the end is left to be said again (and dropped where it meets what was said): templates trim
    it away. Nothing but white space: the request is made again as it was.
    """
    goes_on = bool(plain(request.get("continue_final_message")))
    if plain(request.get("add_generation_prompt")) is False and not goes_on:
        raise CannotContinue("`add_generation_prompt` is false")
    spoken = text.rstrip()
    if not spoken:
        return {}
    if dialect.chat is None:
        raise CannotContinue("the engine cannot continue a message of a chat with tools")
    messages = plain(request["messages"])
    if not goes_on:
        return {"messages": [*messages, {"role": "assistant", "content": spoken}], **dialect.chat}
    last = dict(messages[-1])
    if not isinstance(last.get("content"), str):
        raise CannotContinue("the message to be continued is not plain text")
    last["content"] += spoken
    return {"messages": [*messages[:-1], last], **dialect.chat}


def _prompt(given: Any, said: Said, text: str, encode: Encode) -> Any:
    """The prompt with what was said behind it: by the very token ids where all are known, else by text.

    A prompt of token ids takes the text's tokens: not always those that were said, but the same text.
    """
    prompt = plain(given)
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        prompt = prompt[0]
    numbers = isinstance(prompt, list) and all(isinstance(token, int) for token in prompt)
    ids = prompt if numbers else said.prompt_ids
    if said.tokens is not None and ids:
        return [*ids, *said.tokens]
    if isinstance(prompt, str):
        return prompt + text
    tokens = encode(text) if numbers and prompt else None
    if tokens is None:
        raise CannotContinue("the prompt is not one text, and the tokens said are not known")
    return [*prompt, *tokens]


def whole_words(request: Mapping[str, Any], said: Said, dialect: Continuation) -> int:
    """How many characters of the text to go on from, so that it ends with a whole word.

    What an engine shows beside stop strings may end within a token, and from half a word a model goes on
    otherwise. Only where the same word will be said again: at temperature 0. All of the text elsewhere, also
    with log probabilities (they would be told twice) and within a word of more than 64 characters.
    """
    text = said.text
    greedy = request.get("temperature") is not None and plain(request["temperature"]) == 0
    # A completion's `logprobs` of 0 asks for those of the tokens said.
    probabilities = plain(request.get("logprobs"))
    if not (greedy and dialect.holds_back and holds_back(request)):
        return len(text)
    if said.finish or said.tokens or not (probabilities is None or probabilities is False):
        return len(text)
    whole = text.rstrip()
    if whole == text:
        whole = text[: len(text) - len((text.rsplit(maxsplit=1) or [""])[-1])].rstrip()
    kept = len(whole)
    return kept if len(text) - kept <= _LONGEST_WORD else len(text)


def stops_of(request: Mapping[str, Any]) -> tuple[str, ...]:
    """The stop strings a request names."""
    stop = plain(request.get("stop"))
    given = [stop] if isinstance(stop, str) else stop if isinstance(stop, list) else []
    return tuple(text for text in given if isinstance(text, str) and text)


def window_of(request: Mapping[str, Any]) -> int:
    """How many characters an engine may hold back for the request's stop strings."""
    return max(map(len, stops_of(request))) - 1 if holds_back(request) else 0


def holds_back(request: Mapping[str, Any]) -> bool:
    """Whether the engine keeps text back that may be the beginning of a stop string."""
    return bool(stops_of(request)) and not plain(request.get("include_stop_str_in_output"))


def plain(value: Any) -> Any:
    """A request's value, decoded."""
    return msgspec.json.decode(value) if isinstance(value, msgspec.Raw) else value
