"""The mocker's language: text to tokens, chat to text, and the words it answers with.

The next token is a function of all tokens before it, so a prompt that ends with the first half of an answer
is answered with the second half. Only tokens that are one whole word with a space before it are said: such
text is cut into the same tokens again.
"""

from __future__ import annotations

import json
import re
import struct
from array import array
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash
from tokenizers import Tokenizer

from dynctl.errors import RequestError, UsageError

BUILTIN = Path(__file__).resolve().parent / "assets" / "tiny"
_WORD = re.compile("(?:\u0120|\u2581)[a-z]{2,}")
"""A vocabulary entry that is a space and a word, as byte-level and sentencepiece vocabularies write it."""
_MOST_WORDS = 1024


class HashSource:
    """Gives tokens by the XXH3 hash of all tokens so far (u32 little-endian)."""

    __slots__ = ("_eos", "_eos_every", "_packed", "_state", "_words")

    def __init__(self, vocabulary: Vocabulary, prompt: Sequence[int], eos_every: int) -> None:
        self._words = vocabulary.words
        self._packed = vocabulary.packed
        self._eos = vocabulary.eos
        self._eos_every = eos_every
        self._state = xxhash.xxh3_64(array("I", prompt).tobytes())

    def next(self, eos_allowed: bool) -> int:
        """The next token; the end-of-answer token at about one of `eos_every` places, if allowed."""
        digest = self._state.intdigest()
        if eos_allowed and self._eos_every and digest % self._eos_every == 0:
            return self._eos
        index = (digest >> 32) % len(self._words)
        self._state.update(self._packed[index])
        return self._words[index]


class Vocabulary:
    """A tokenizer directory: `encode`, `decode`, `render`, and the words to answer with.

    `pieces` maps a token that may be said to its text as inside a JSON string. Raises UsageError when files
    are missing or hold no usable words.
    """

    def __init__(self, directory: Path, chat_template: str = "") -> None:
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise UsageError(
                "no tokenizer.json there",
                where=str(directory),
                hint="a model directory with a tokenizer.json",
            )
        self._tokenizer = Tokenizer.from_file(str(path))
        self._config = _read_json(directory / "tokenizer_config.json")
        self._template_text = _read_template(directory, chat_template, self._config)
        self._template: Callable[..., str] | None = None
        self.size = self._tokenizer.get_vocab_size()
        token = _read_json(directory / "config.json").get("image_token_id")
        self.image_token: int | None = token if isinstance(token, int) else None
        """What stands for images in prompts; None = the model sees none, and contents are their text."""
        self.eos = self._find_eos()
        self.words = self._find_words()
        if not self.words:
            raise UsageError("its vocabulary holds no whole lower-case words", where=str(path))
        self.packed = [struct.pack("<I", word) for word in self.words]
        texts = {word: self._tokenizer.decode([word]) for word in self.words}
        self.texts = {word: text if text.startswith(" ") else f" {text}" for word, text in texts.items()}
        self.texts[self.eos] = ""
        self.pieces = {token: json.dumps(text)[1:-1].encode() for token, text in self.texts.items()}

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text; `special` adds what the tokenizer puts around a prompt."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special).ids
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids, special ones left out."""
        text: str = self._tokenizer.decode(list(tokens))
        return text

    def source(self, prompt: Sequence[int], eos_every: int) -> HashSource:
        """What comes after a prompt."""
        return HashSource(self, prompt, eos_every)

    def render(self, messages: Sequence[Mapping[str, Any]], *, generate: bool, resume: bool) -> str:
        """The prompt of a chat. `generate` opens the assistant's turn; `resume` leaves the last message open.

        Raises RequestError when there is no template or it refuses the messages.
        """
        import jinja2  # not at the top: it is slow to import, and health checks need no templates

        if self._template is None:
            self._template = _compile(self._template_text)
        look = _plain_text if self.image_token is None else _parts
        plain: list[dict[str, Any]] = [
            {**message, "content": look(message.get("content"))} for message in messages
        ]
        special = {name: _content(self._config.get(name)) for name in ("bos_token", "eos_token")}
        try:
            text = self._template(messages=plain, add_generation_prompt=generate, **special)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise RequestError(f"the chat template refused the messages: {error}") from error
        if not resume:
            return text
        said = _plain_text(messages[-1].get("content")) if messages else ""
        last = said.rstrip()
        return text[: text.rindex(last) + len(said)] if last in text else text

    def _find_eos(self) -> int:
        name = _content(self._config.get("eos_token"))
        token = self._tokenizer.token_to_id(name) if name else None
        return -1 if token is None else int(token)

    def _find_words(self) -> list[int]:
        found = sorted(
            (int(token), text) for text, token in self._tokenizer.get_vocab().items() if _WORD.fullmatch(text)
        )
        words: list[int] = []
        for token, text in found:
            if self.encode(f" {text[1:]}", special=False) == [token]:
                words.append(token)
            if len(words) == _MOST_WORDS:
                break
        return words


def _compile(text: str) -> Callable[..., str]:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if not text:
        raise RequestError("the model has no chat template", hint="give one with --chat-template")
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(text).render


def _plain_text(content: object) -> str:
    """A message's content: a string, or the text parts of a list."""
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return "" if content is None else str(content)


def _parts(content: object) -> object:
    """A message's content as templates that know of images get it: text and image parts."""
    if not isinstance(content, list):
        return _plain_text(content)
    kept = (part for part in content if isinstance(part, dict))
    return [
        {"type": "image"}
        if part.get("type") == "image_url"
        else {"type": "text", "text": str(part.get("text", ""))}
        for part in kept
    ]


def _content(token: object) -> str:
    """A special token is named by a string or by a map with `content`."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")


def _read_template(directory: Path, override: str, config: Mapping[str, Any]) -> str:
    if override:
        try:
            return Path(override).read_text(encoding="utf-8")
        except OSError as error:
            raise UsageError(f"cannot read the chat template: {error.strerror}", where=override) from error
    beside = directory / "chat_template.jinja"
    if beside.is_file():
        return beside.read_text(encoding="utf-8")
    template = config.get("chat_template", "")
    return template if isinstance(template, str) else ""


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} when there is none. Raises UsageError for a file that holds no object."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"not JSON: {error}", where=str(path)) from error
    if not isinstance(value, dict):
        raise UsageError("a JSON object is needed", where=str(path))
    return value


def max_positions(directory: Path) -> int:
    """`max_position_embeddings` of the model's config.json, 0 when it is not stated."""
    value = _read_json(directory / "config.json").get("max_position_embeddings", 0)
    return value if isinstance(value, int) else 0
