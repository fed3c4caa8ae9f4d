"""The second way to go on with a chat: its prompt and what was said as one completion. Pure.

For what no engine can continue as a message: reasoning that has begun, and any answer of an engine that
continues no messages. The prompt is the engine's own and the very tokens said, where the client was told
both; else what the chat template gives, and the text as it was generated, with the marks of reasoning.
`as_chat` makes chat chunks of what comes back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dynctl.engines.base import Continuation
from dynctl.router.as_chat import Retelling
from dynctl.router.migration import CannotContinue, budget, check, holds_back, plain
from dynctl.router.reasoning import Marks
from dynctl.router.said import Json, Said
from dynctl.router.spoken import Made

_CHATS_ONLY = frozenset(
    (
        "messages",
        "max_completion_tokens",
        "top_logprobs",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "functions",
        "function_call",
        "response_format",
        "reasoning_effort",
        "reasoning",
        "include_reasoning",
        "separate_reasoning",
        "stream_reasoning",
        "thinking",
        "thinking_token_budget",
        "chat_template",
        "chat_template_kwargs",
        "add_generation_prompt",
        "continue_final_message",
        "add_special_tokens",
        "documents",
        "mm_processor_kwargs",
        "media_io_kwargs",
        "modalities",
        "audio",
        "prediction",
        "web_search_options",
        "verbosity",
        "service_tier",
        "store",
        "metadata",
    )
)
"""Fields of a chat that completions have not: what they say is in the prompt, or nothing more comes of it."""


@dataclass(frozen=True, slots=True)
class Source:
    """What a chat is told anew from. `rendered`: its prompt as the chat template gives it; None = not needed,
    the tokens are known. `marks` None: the model's are not known. `closing_id`: the closing mark's token.
    `context` in tokens, 0 = not known.
    """

    rendered: str | None
    marks: Marks | None
    closing_id: int | None = None
    context: int = 0

    @property
    def opened(self) -> bool:
        """Whether the prompt itself opens the reasoning."""
        return bool(self.rendered and self.marks and self.rendered.rstrip().endswith(self.marks.opening))


def retells(kind: str, request: Json, said: Said, dialect: Continuation) -> bool:
    """Whether the rest is to be asked for as a completion. Raises CannotContinue where nothing could be."""
    if kind != "chat" or said.finish:
        return False
    check(request, said)
    if said.reasoning:
        check_no_tools(request)
    elif offers_tools(request):
        return False
    return said.reasoning or (dialect.chat is None and bool(said.text))


def check_no_tools(request: Json) -> None:
    """Raises CannotContinue for a chat that has begun to reason and has tools on offer."""
    if offers_tools(request):
        raise CannotContinue("reasoning was begun, and a call of the tools offered could follow it")


def holds_marks(text: str, marks: Marks) -> bool:
    """Whether a text has reasoning in it that its engine did not take out."""
    return marks.opening in text or marks.closing in text


def exact(said: Said) -> bool:
    """Whether the client was told the tokens of the prompt and of all that was said."""
    return bool(said.prompt_ids and said.tokens)


def offers_tools(request: Json) -> bool:
    """Whether the answer may be a call of a tool."""
    return bool(plain(request.get("tools"))) and plain(request.get("tool_choice")) != "none"


def made(said: Said, source: Source) -> Made:
    """What was generated. Raises CannotContinue when there was reasoning and its marks are not known."""
    thoughts, text = said.thoughts, said.text
    if not said.reasoning:
        return Made(text, len(text))
    if said.unordered:
        raise CannotContinue("reasoning was begun anew after text")
    marks = source.marks
    if marks is None:
        if text and exact(said):
            return Made(thoughts + text, len(thoughts + text))
        raise CannotContinue("reasoning was begun, and the model's marks of it are not known")
    opening = "" if source.opened else marks.opening
    closing = marks.closing if text else ""
    whole = opening + thoughts + closing + text
    return Made(whole, len(whole), len(opening), len(thoughts), len(closing))


def retold(
    request: Json, said: Said, spoken: int, prompt: Sequence[int], source: Source, dialect: Continuation
) -> tuple[Json, Retelling]:
    """The completion that says the rest, {} when all was said, and how it is told as a chat.

    `prompt`: all tokens, of the client's prompt and of what was said.
    """
    how = _retelling(request, said, source)
    limits = budget("chat", request, spoken, dialect)
    limit = None if limits is None else _limit(limits, len(prompt), source.context)
    if limits is None or (limit is not None and limit <= 0):
        return {}, how
    rest: Json = {name: value for name, value in request.items() if name not in _CHATS_ONLY}
    rest["prompt"] = list(prompt)
    if "min_tokens" in limits:
        rest["min_tokens"] = limits["min_tokens"]
    rest.pop("max_tokens", None)
    if limit is not None or dialect.completion_tokens is not None:
        rest["max_tokens"] = limit
    if "logprobs" in rest:
        # A chat says whether; a completion how many, of which one at least to be sure that they come.
        rest["logprobs"] = max(1, how.top) if plain(rest["logprobs"]) else None
    if how.leaves_out:
        rest["skip_special_tokens"] = False
    return rest, how


def check_tokens(request: Json, said: Said, source: Source) -> None:
    """Raises CannotContinue for tokens told whose text the client would never see, or see twice."""
    if said.tokens and (set(said.silent) - {source.closing_id} or holds_back(request)):
        raise CannotContinue("token ids were told whose text was held back")


def _limit(limits: Json, prompt: int, context: int) -> int | None:
    """What is left of the chat's limit, and of the context: a chat without a limit goes to its end."""
    asked = limits.get("max_completion_tokens", limits.get("max_tokens"))
    room = context - prompt if context else None
    return min((limit for limit in (asked, room) if limit is not None), default=None)


def _retelling(request: Json, said: Said, source: Source) -> Retelling:
    top: Any = plain(request.get("top_logprobs")) or 0
    marks = source.marks
    closed = bool(said.text) or (exact(said) and source.closing_id in (said.tokens or ()))
    if not said.reasoning or closed or marks is None:
        return Retelling(top=top)
    # Without special tokens the end of the reasoning could not be seen; the others are not for the client.
    shows = marks.hidden and plain(request.get("skip_special_tokens")) is not False
    return Retelling(marks.closing, said.fields, (*marks.specials, marks.opening) if shows else (), top)
