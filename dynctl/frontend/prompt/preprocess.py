"""A request's prompt as tokens and sequence hashes, for routing; the engine still makes its own.

Whatever cannot be tokenised here (no tokenizer at hand, images, options that change the prompt) is known by
its bytes alone (`alike`), and the reason is counted. What is long is worked on in a thread.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import msgspec

from dynctl.errors import ContextTooLong, DynctlError
from dynctl.frontend.body import Body, large_batch, messages, prompt
from dynctl.frontend.prompt.alike import alike
from dynctl.frontend.prompt.cuts import cuts_of
from dynctl.frontend.prompt.images import ImageNames
from dynctl.frontend.prompt.model_files import ModelFiles, find_model_files
from dynctl.frontend.prompt.pictured import Pictured, pictured
from dynctl.frontend.prompt.token_cache import Begun, Frame, TokenCache, Tokenised
from dynctl.frontend.prompt.vocabulary import known_tokens
from dynctl.kv.hashing import pack_tokens, root_hash, sequence_hashes
from dynctl.kv.media import Layouts
from dynctl.observability.metrics import Metrics
from dynctl.protocol.instances import ModelCard
from dynctl.router.reasoning import Marks, marks_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from dynctl.frontend.prompt.template import ChatTemplate

logger = logging.getLogger(__name__)

Kind = Literal["chat", "completions"]
DEFAULT_CACHE_BYTES = 128 * 1024 * 1024
THREAD_CHARS = 8_192
"""More than so many characters that are left to tokenise are worked on in a thread."""
_THREAD_BYTES = 512 * 1024
"""A longer body is not even read on the loop."""
_IMAGE_BYTES = 128 * 1024
"""A longer one with images is not looked through on the loop."""
_SUSPECT_CHARS = 8
_SLICE_CHARS = 65_536
_SLICE_SLACK = 64
"""A text of more than `_SUSPECT_CHARS` characters for each token of the context is counted in slices first,
so that megabytes which cannot fit cost no more than what shows it. A cut may add some tokens: fewer than
`_SLICE_SLACK`.
"""
_CONTEXT_CHARS = 64
"""How much of what is before a piece of text its tokens may depend on."""
_PROMPT_CHANGERS = ("chat_template", "truncate_prompt_tokens", "prompt_embeds", "add_special_tokens")
"""Fields that make the engine's prompt differ from what is computed here."""


class NotTokenised(Exception):
    """There are no tokens for this request; `reason` is the stable word for the metric."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class PromptFacts(msgspec.Struct, frozen=True):
    """What routing and admission know of a prompt. `tokens` 0 and `hashes` None = not known.

    `approximate`: where there are no tokens, hashes of the request's bytes, one for about as many as make a
    block, and `estimate`, how many tokens that may be. Equal hashes mean that prompts begin alike. Those of
    the blocks before an image that is not known are as in `hashes`.
    """

    tokens: int = 0
    hashes: Sequence[int] | None = None
    approximate: Sequence[int] | None = None
    estimate: int = 0


UNKNOWN = PromptFacts()


class _Job(msgspec.Struct, frozen=True):
    """One prompt to be worked on. `context` in tokens, 0 = no limit. `images`: what they are known by."""

    kind: Kind
    body: Body
    block_size: int
    root: int
    context: int
    images: list[str] = []


@dataclass(frozen=True, slots=True)
class _Ends:
    """The special tokens a tokenizer puts before and after a text (packed)."""

    before: bytes = b""
    after: bytes = b""


class Preprocessor:
    """Tokenises for one model. `warm` loads tokenizer and template; requests that come before wait for it.

    `cache_bytes`: how large the cache of texts tokenised may be. `names`: how the engine is told what images
    are known by, None = it is not; `layouts`: the tokens of those that engines have shown.
    """

    def __init__(
        self,
        card: ModelCard,
        metrics: Metrics,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        names: ImageNames | None = None,
        layouts: Layouts | None = None,
    ) -> None:
        self._card = card
        self._names = names
        self._layouts = Layouts() if layouts is None else layouts
        self._image_token: int | None = None
        self._metrics = metrics
        self._cache_bytes = cache_bytes
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenise")
        self._tokenizer: Tokenizer | None = None
        self._cache: TokenCache | None = None
        self._ends: _Ends | None = None
        self._template: ChatTemplate | None = None
        self._is_token: Callable[[str], bool] = bool
        self._loading: asyncio.Task[None] | None = None
        self.marks: Marks | None = None
        """Between which the model reasons, once loaded; None = not known."""
        self._template_seconds = metrics.histogram("template_seconds")
        self._tokenize_seconds = metrics.histogram("tokenize_seconds")
        self._tokenize_ms = metrics.histogram("tokenizer_latency_ms", operation="tokenize")
        self._hits = metrics.counter("tokenizer_cache_hits_total")
        self._misses = metrics.counter("tokenizer_cache_misses_total")
        self._cached = metrics.counter("tokenizer_cache_cached_tokens_total")
        self._uncached = metrics.counter("tokenizer_cache_uncached_tokens_total")

    def warm(self) -> asyncio.Task[None]:
        """Begin to load, in a thread; the task ends when tokens can be made, or never will be."""
        if self._loading is None:
            self._loading = asyncio.create_task(self._load(), name="preprocess.load")
        return self._loading

    def encode(self, text: str) -> list[int] | None:
        """Tokens of an answer's text, None when there is no tokenizer (yet)."""
        return None if self._tokenizer is None else list(_ids(self._tokenizer, [text])[0])

    def count(self, text: str, start: int, end: int) -> int | None:
        """How many tokens a part of a text is, where it stands; None as for `encode`."""
        tokenizer = self._tokenizer
        if tokenizer is None:
            return None
        if self._is_token(text[start:end]):
            return 1
        before = text[max(0, start - _CONTEXT_CHARS) : start]
        alone, both = _ids(tokenizer, [before, before + text[start:end]])
        return max(0, len(both) - len(alone))

    async def ready(self) -> None:
        """Wait until tokens can be made, or never will be."""
        loading = self.warm()
        if not loading.done():
            await asyncio.shield(loading)

    async def chat_text(self, body: Body) -> str:
        """A chat's prompt as text. Raises NotTokenised."""
        await self.ready()
        _check_unchanged(body)
        if len(body.original) <= _THREAD_BYTES:
            return self._chat_text(body)
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._chat_text, body)

    async def tokens(self, text: str) -> list[int] | None:
        """Tokens of a text that holds its special tokens itself; None as for `encode`."""
        if len(text) <= THREAD_CHARS:
            return self.encode(text)
        return await asyncio.get_running_loop().run_in_executor(self._threads, self.encode, text)

    async def prompt_tokens(self, kind: Kind, body: Body) -> int:
        """How many tokens a prompt has that an engine has taken; 0 = not known."""
        try:
            return (await self.prepare(kind, body, self._card.block_size)).tokens
        except DynctlError:
            return 0

    async def named(self, body: Body) -> Body:
        """The chat with its images named for the engine, where that makes blocks known here; else itself."""
        await self.ready()
        if self._names is None or not self._pictures:
            return body
        if len(body.original) <= _IMAGE_BYTES:
            return self._names.named(body)
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._names.named, body)

    @property
    def _pictures(self) -> bool:
        """Whether it is known which token of a chat's prompt stands for an image."""
        return self._image_token is not None and self._template is not None and self._template.wraps_parts

    def close(self) -> None:
        """Give the threads back without waiting for them."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def prepare(
        self, kind: Kind, body: Body, block_size: int, adapter: str = "", *, context: int = 0
    ) -> PromptFacts:
        """Tokens and hashes of the prompt. Raises RequestError for fields that are wrong in themselves.

        Raises ContextTooLong, as early as it can be known, for a text far beyond `context` tokens (0: no
        limit known). A prompt that is a little too long is given back, without hashes: the caller judges.
        """
        root = root_hash(adapter, body.get("cache_salt", str) or "")
        try:
            _check_unchanged(body)
            await self.ready()
            return await self._prepare(_Job(kind, body, block_size, root, context, self._images(kind, body)))
        except NotTokenised as why:
            self._fallen_back(why.reason)
            if len(body.original) <= _THREAD_BYTES:
                return PromptFacts(0, None, *alike(body, block_size, root))
            in_thread = asyncio.get_running_loop().run_in_executor
            return PromptFacts(0, None, *await in_thread(self._threads, alike, body, block_size, root))

    def _fallen_back(self, reason: str) -> None:
        self._metrics.counter("tokenize_fallbacks_total", reason=reason).inc()

    async def _prepare(self, job: _Job) -> PromptFacts:
        in_thread = asyncio.get_running_loop().run_in_executor
        long = len(job.body.original) > _THREAD_BYTES
        text = await in_thread(self._threads, self._text, job) if long else self._text(job)
        if not isinstance(text, str):
            return _facts(len(text), job, sequence_hashes(text, job.block_size or len(text), job.root))
        cache = self._cache
        if cache is None:
            raise NotTokenised("tokenizer_missing")
        frame = self._frame(job)
        started = time.perf_counter()
        begun = await in_thread(self._threads, cache.begin, text) if long else cache.begin(text)
        uncached = sum(map(len, begun.left))
        if job.images:
            far = long or len(text) > THREAD_CHARS
            found = (
                await in_thread(self._threads, self._picture, cache, begun, job)
                if far
                else self._picture(cache, begun, job)
            )
            return self._picture_facts(found, job)
        if uncached > THREAD_CHARS:
            made = await in_thread(self._threads, self._complete, cache, begun, frame, job.context)
        else:
            made = self._complete(cache, begun, frame, job.context)
        seconds = time.perf_counter() - started
        self._tokenize_seconds.observe(seconds)
        self._tokenize_ms.observe(seconds * 1000)
        self._note(made)
        return _facts(made.tokens, job, made.hashes)

    def _picture(self, cache: TokenCache, begun: Begun, job: _Job) -> Pictured:
        assert self._image_token is not None
        packed = cache.packed(begun)
        found = pictured(packed, self._image_token, job.images, self._layouts.get, job.block_size, job.root)
        if found is None:
            raise NotTokenised("multimodal")
        return found

    def _picture_facts(self, found: Pictured, job: _Job) -> PromptFacts:
        """What may be too long is the engine's to refuse: it alone knows what its images take."""
        if found.exact and (found.tokens <= job.context or job.context <= 0):
            return PromptFacts(found.tokens, found.hashes if job.block_size > 0 else None)
        self._fallen_back("multimodal")
        return PromptFacts(0, None, found.hashes, found.tokens)

    def _note(self, made: Tokenised) -> None:
        (self._hits if made.cached else self._misses).inc()
        self._cached.inc(made.cached)
        self._uncached.inc(made.tokens - made.cached)

    def _images(self, kind: Kind, body: Body) -> list[str]:
        if kind != "chat" or self._names is None or not self._pictures:
            return []
        return self._names.known_by(body)

    def _text(self, job: _Job) -> str | Sequence[int]:
        """The text to tokenise, or the tokens where the client gave them."""
        if job.kind == "chat":
            return self._chat_text(job.body, job.images)
        if large_batch(job.body):
            raise NotTokenised("batch")
        given = prompt(job.body)
        if isinstance(given, list) and len(given) == 1 and not isinstance(given[0], int):
            given = given[0] if isinstance(given[0], str) else list(given[0])
        if isinstance(given, str):
            return given
        if not given or not all(isinstance(token, int) for token in given):
            raise NotTokenised("batch" if given else "prompt_missing")
        return [token for token in given if isinstance(token, int)]

    def _chat_text(self, body: Body, images: Sequence[str] = ()) -> str:
        from dynctl.frontend.prompt.template import Unrenderable

        if self._template is None:
            raise NotTokenised("template_missing")
        started = time.perf_counter()
        try:
            text = self._template.render(body, messages(body), images=bool(images))
        except Unrenderable as error:
            logger.debug("prompt.unrenderable why=%s", error)
            raise NotTokenised(error.reason) from error
        self._template_seconds.observe(time.perf_counter() - started)
        return text

    def _frame(self, job: _Job) -> Frame:
        """Chat templates write special tokens themselves; to completions they are added."""
        ends = _Ends() if job.kind == "chat" else self._ends
        if ends is None:
            raise NotTokenised("post_processor_unknown")
        return _frame(max(0, job.block_size), job.root, ends)

    def _complete(self, cache: TokenCache, begun: Begun, frame: Frame, context: int) -> Tokenised:
        left = begun.left if context else []
        if sum(map(len, left)) > _SUSPECT_CHARS * context:
            assert self._tokenizer is not None
            _refuse_far_too_long(self._tokenizer, "".join(left), context)
        return cache.complete(begun, frame)

    async def _load(self) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(self._threads, self._load_files)
        except (OSError, ValueError) as error:
            logger.warning("tokenizer.unusable model=%s why=%s", self._card.name, error)
        except Exception:
            # The top of a task that every request waits for: an odd model file must not fail them all.
            logger.exception("tokenizer.unusable model=%s", self._card.name)

    def _load_files(self) -> None:
        files = find_model_files(self._card)
        if files.tokenizer_json is None:
            logger.warning("tokenizer.missing model=%s path=%s", self._card.name, self._card.path)
            return
        from tokenizers import Tokenizer

        # Pieces of one prompt are not worth a thread each: there is a thread for each prompt.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        try:
            tokenizer = Tokenizer.from_file(str(files.tokenizer_json))
        except Exception as error:  # the library raises bare Exception for a file it cannot read
            raise ValueError(f"{files.tokenizer_json}: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._ends = _ends_of(tokenizer)

        def tokenise(texts: list[str]) -> list[list[int]]:
            return _ids(tokenizer, texts)

        self._tokenizer = tokenizer
        self._cache = TokenCache(tokenise, cuts_of(files.tokenizer_json.read_bytes()), self._cache_bytes)
        self._is_token = known_tokens(tokenizer)
        added = {token.content: token.special for token in tokenizer.get_added_tokens_decoder().values()}
        self.marks = marks_of(added, files.template_source)
        self._load_template(files)
        self._image_token = files.image_token

    def _load_template(self, files: ModelFiles) -> None:
        from dynctl.frontend.prompt.template import ChatTemplate, Unrenderable

        if not files.template_source:
            logger.warning("chat_template.missing model=%s", self._card.name)
            return
        try:
            self._template = ChatTemplate(files.template_source, files.special_tokens)
        except Unrenderable as error:
            logger.warning("chat_template.unusable model=%s why=%s", self._card.name, error)


def _check_unchanged(body: Body) -> None:
    """Raises NotTokenised when the engine's prompt will not be what is computed here."""
    changed = next((name for name in _PROMPT_CHANGERS if body.has(name)), None)
    if changed is not None:
        raise NotTokenised(changed)


def likeness(body: Body, block_size: int, adapter: str = "") -> PromptFacts:
    """What can be said of a prompt that is not tokenised here."""
    return PromptFacts(0, None, *alike(body, block_size, root_hash(adapter)))


def _facts(tokens: int, job: _Job, hashes: Sequence[int]) -> PromptFacts:
    known = job.block_size > 0 and (tokens <= job.context or job.context <= 0)
    return PromptFacts(tokens, hashes if known else None)


@lru_cache(maxsize=1024)
def _frame(block_size: int, root: int, ends: _Ends) -> Frame:
    """One object for equal frames: comparing them is then quick."""
    return Frame(block_size, root, ends.before, ends.after)


def _ends_of(tokenizer: Tokenizer) -> _Ends | None:
    """What a post-processor puts around a text; None when it does more than that."""
    plain, full = (tokenizer.encode("a", add_special_tokens=added).ids for added in (False, True))
    for at in range(len(full) - len(plain) + 1):
        if plain and full[at : at + len(plain)] == plain:
            return _Ends(pack_tokens(full[:at]), pack_tokens(full[at + len(plain) :]))
    return None


def _ids(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Of the library's calls the one that lets other threads run meanwhile: `encode` would stop them all."""
    return [one.ids for one in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def _refuse_far_too_long(tokenizer: Tokenizer, text: str, context: int) -> None:
    """Raises ContextTooLong as soon as the slices so far are more than fits, whatever the cuts have added."""
    count = 0
    for number, start in enumerate(range(0, len(text), _SLICE_CHARS), 1):
        count += len(_ids(tokenizer, [text[start : start + _SLICE_CHARS]])[0])
        least = count - _SLICE_SLACK * number
        if least > context:
            raise ContextTooLong(
                f"This model's maximum context length is {context} tokens. However, your messages "
                f"resulted in more than {least} tokens. Please reduce the length of the messages.",
                where="messages",
            )
