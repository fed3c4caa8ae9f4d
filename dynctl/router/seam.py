"""A second worker's stream as the rest of the first one's: one id, one role, one count of tokens. Pure.

Every event of a later leg is read and written anew; only streams that were migrated pay for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from dynctl.protocol.sse import DONE, LAST_EVENT, event, event_data, split_events
from dynctl.router.as_chat import AsChat, Retelling
from dynctl.router.migration import Kind, stops_of
from dynctl.router.said import Json, Said
from dynctl.router.spoken import Made

_EMPTY: tuple[object, ...] = (None, "", [], {})
_IDLE_FIELDS = ("index", "logprobs", "finish_reason", "stop_reason")


@dataclass(frozen=True, slots=True)
class Taken:
    """What of an answer the next leg takes for said: tokens, and what was generated. `retelling`: how that
    leg's completion is told as a chat; None = it is of the client's own kind.
    """

    spoken: int
    made: Made
    retelling: Retelling | None = None


@dataclass(frozen=True, slots=True)
class Joint:
    """What a leg is joined on by. Tokens: of the client's prompt (0 = not known), and said before this leg.

    `drop`: white space that was said and that the worker is asked to say again. `wants_usage`: the client
    asked for usage at the end. `made` and `retelling` as in `Taken`; `made` None: the text that was said.
    """

    kind: Kind
    prompt_tokens: int
    spoken: int
    stops: tuple[str, ...] = ()
    include_stop: bool = False
    drop: str = ""
    wants_usage: bool = False
    made: Made | None = None
    retelling: Retelling | None = None

    @classmethod
    def of(
        cls, kind: Kind, request: Mapping[str, Any], said: Said, prompt_tokens: int, taken: Taken
    ) -> Joint:
        """For what `migration.continuation` or `retell.retold` gave a request for."""
        if said.prompt_ids:
            prompt_tokens = len(said.prompt_ids)
        elif said.usage is not None:
            prompt_tokens = said.usage[0]
        options = request.get("stream_options")
        options = msgspec.json.decode(options) if isinstance(options, msgspec.Raw) else options
        spoken, made = taken.spoken, taken.made
        return cls(
            kind=kind,
            prompt_tokens=prompt_tokens,
            spoken=spoken,
            # Until `min_tokens` are said the engine does not look for stop strings either.
            stops=() if (request.get("min_tokens") or 0) > spoken else stops_of(request),
            include_stop=bool(request.get("include_stop_str_in_output")),
            drop=made.text[made.kept :],
            wants_usage=bool(isinstance(options, dict) and options.get("include_usage")),
            made=made,
            retelling=taken.retelling,
        )


def ending(said: Said, joint: Joint, reason: str) -> bytes:
    """The events that end a stream for which nothing is left to be asked: finish, usage, [DONE].

    No usage where the prompt's tokens are not known.
    """
    if said.done:
        return b""
    events: list[Json] = []
    if not said.finish:
        choice: Json = {"index": 0, **({"delta": {}} if joint.kind == "chat" else {"text": ""})}
        events.append({**said.head, "choices": [{**choice, "logprobs": None, "finish_reason": reason}]})
    if joint.wants_usage and said.usage is None and joint.prompt_tokens:
        usage = _usage(joint.prompt_tokens, joint.spoken)
        events.append({**said.head, "choices": [], "usage": usage})
    for chunk in events:
        said.take(chunk)
    said.done = True
    return b"".join(map(event, events)) + LAST_EVENT


def _usage(prompt: int, completion: int) -> Json:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class Seam:
    """Takes one later leg's payload by `feed`, gives what the client is to be sent, and keeps `said` true.

    `lost`: why this leg cannot be gone on with (the engine aborted it, or told an error); `over`: [DONE] was
    given, the rest of the leg is not needed.
    """

    def __init__(self, said: Said, joint: Joint) -> None:
        self._said = said
        self._joint = joint
        self._pending = b""
        self._drop = joint.drop
        self._as_chat = AsChat(joint.retelling) if joint.retelling is not None else None
        made = joint.made or Made.plain(said, trims=False)
        said.settle(made.kept, joint.spoken)
        self._window = max(map(len, joint.stops), default=1) - 1
        self._tail = made.text[-self._window :] if self._window else ""
        self._before = len(self._tail)
        self._shift = len(said.text)
        self._tokens = 0
        self.lost = ""
        self.over = False

    @property
    def spoken(self) -> int:
        """Tokens said so far by all legs."""
        return self._joint.spoken + self._tokens

    def feed(self, payload: bytes) -> bytes:
        """Take payload bytes without chunk framing; what can be sent of them."""
        events, self._pending = split_events(self._pending + payload)
        out: list[bytes] = []
        for one in events:
            if self.lost or self.over:
                break
            out.append(self._take(one))
        return b"".join(out)

    def _take(self, given: bytes) -> bytes:
        data = event_data(given)
        if data == DONE:
            return self._end()
        try:
            chunk = msgspec.json.decode(data) if data else None
        except (msgspec.DecodeError, UnicodeDecodeError):
            chunk = None
        if not isinstance(chunk, dict):
            return given  # a comment, or nothing that is known here
        if chunk.get("error") or chunk.get("object") == "error":
            self.lost = data[:300].decode("utf-8", "replace")
            return b""
        return self._chunk(chunk)

    def _end(self) -> bytes:
        if not self._said.finish:
            self.lost = "its stream ended without a finish"
            return b""
        self.over = self._said.done = True
        return LAST_EVENT

    def _chunk(self, chunk: Json) -> bytes:
        chunk.update(self._said.head)
        chunk.pop("prompt_token_ids", None)
        stopped = opening = False
        for choice in chunk.get("choices") or ():
            opening |= bool((choice.get("delta") or {}).get("role"))
            if choice.get("finish_reason") == "abort":
                self.lost = "the engine aborted the request"
                return b""
            stopped |= self._choice(choice)
        if chunk.get("usage"):
            chunk["usage"] = self._joined_usage(chunk["usage"])
        elif chunk.get("choices") and all(map(_is_idle, chunk["choices"])):
            if not opening:
                self._said.beat()
            return b""
        self._said.take(chunk)
        if not stopped:
            return event(chunk)
        self.over = True
        return event(chunk) + self._stop_ending()

    def _stop_ending(self) -> bytes:
        """After a stop string that lay across the seam: usage as far as it is known, and [DONE]."""
        joint = self._joint
        told = Joint(joint.kind, joint.prompt_tokens, self.spoken, wants_usage=joint.wants_usage)
        return ending(self._said, told, "stop")

    def _choice(self, choice: Json) -> bool:
        """Make one choice of a chunk fit; True when a stop string that began before the seam is whole."""
        choice.pop("prompt_token_ids", None)
        delta = choice.get("delta")
        holder, name = (delta, "content") if isinstance(delta, dict) else (choice, "text")
        if holder is delta and self._said.role:
            holder.pop("role", None)
        self._tokens += len(choice.get("token_ids") or ()) or bool(holder.get(name))
        offsets = (choice.get("logprobs") or {}).get("text_offset")
        if offsets:
            choice["logprobs"]["text_offset"] = [offset + self._shift for offset in offsets]
        stop = self._text(choice, holder, name) if holder.get(name) else ""
        if self._as_chat is not None:
            self._as_chat.write(choice)
        return bool(stop)

    def _text(self, choice: Json, holder: Json, name: str) -> str:
        """Make a choice's text fit; the stop string that ends in it, when that began before the seam."""
        text, stop = self._across(self._without_repeat(holder[name]))
        holder[name] = text
        if stop:
            choice["finish_reason"] = "stop"
            if "stop_reason" in choice:
                choice["stop_reason"] = stop
        return stop

    def _without_repeat(self, text: str) -> str:
        """`text` without the white space that was said before the seam and is said again."""
        if not self._drop:
            return text
        same = 0
        while same < min(len(text), len(self._drop)) and text[same] == self._drop[same]:
            same += 1
        self._drop = self._drop[same:] if same == len(text) else ""
        return text[same:]

    def _across(self, text: str) -> tuple[str, str]:
        """The text that may be shown, and the stop string that lies across the seam, if one does."""
        if not self._tail:
            return text, ""
        joined = self._tail + text
        found = [
            (at, stop)
            for stop in self._joint.stops
            if 0 <= (at := joined.find(stop, max(0, self._before - len(stop) + 1))) < self._before
        ]
        if found:
            at, stop = min(found)
            shown = at + len(stop) - len(self._tail) if self._joint.include_stop else 0
            return text[:shown], stop
        self._tail = joined if len(joined) - self._before < self._window else ""
        return text, ""

    def _joined_usage(self, usage: Json) -> Json:
        """Usage of the whole: the client's prompt, what all legs said; never less than was told before."""
        joint = self._joint
        given = int(usage.get("prompt_tokens") or 0)
        prompt = joint.prompt_tokens or max(0, given - joint.spoken)
        told = self._said.usage[1] if self._said.usage is not None else 0
        made = joint.spoken + int(usage.get("completion_tokens") or 0)
        joined = {**usage, **_usage(prompt, max(told, made))}
        details = usage.get("prompt_tokens_details")
        if isinstance(details, dict) and isinstance(details.get("cached_tokens"), int):
            joined["prompt_tokens_details"] = {
                **details,
                "cached_tokens": min(details["cached_tokens"], prompt),
            }
        return joined


def _is_idle(choice: Json) -> bool:
    """Whether a choice says nothing: an opening whose role was told before, white space said again."""
    if choice.get("finish_reason") or choice.get("logprobs"):
        return False
    fields = {**choice, **(choice.get("delta") or {})}
    return all(
        value in _EMPTY for name, value in fields.items() if name not in ("index", "delta", *_IDLE_FIELDS)
    )
