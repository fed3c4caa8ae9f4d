"""Texts to token counts and block hashes; what texts begin with alike is tokenised and hashed once.

A text is cut into pieces (`cuts`) whose tokens, put together, are those of the whole. The pieces of all texts
form a tree: a node is a piece after the pieces before it, with its tokens and the hashes of the blocks that
end in it. Nodes least recently used go first when the tree is larger than it may be.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock

import msgspec

from dynctl.frontend.prompt.cuts import Cuts
from dynctl.frontend.prompt.words import Tokenise, Words
from dynctl.kv.hashing import TOKEN_BYTES, pack_tokens, sequence_hashes
from dynctl.native import load

_NODE_BYTES = 600
_HASH_BYTES = 40
_USUAL_BLOCK = 16
_FIRST = 0
_AT_ONCE_CHARS, _AT_ONCE_PYTHON = 128 * 1024, 16 * 1024
"""Known words are put together at once in a text of up to so many characters, compiled and in Python: 2 ms
where they are common, some times that at worst.
"""


@dataclass(frozen=True, slots=True)
class Frame:
    """What hashes depend on beside the text: tokens put before and after it (packed), the block size in
    tokens (0: no hashes are wanted), and the hash before the first block.
    """

    block_size: int
    root: int
    before: bytes = b""
    after: bytes = b""


# gc=False: numbers only, so it can be part of no cycle.
class Tokenised(msgspec.Struct, frozen=True, gc=False):
    """`tokens` of the text in its frame, of these `cached` from the tree; `hashes` of the full blocks."""

    tokens: int
    cached: int
    hashes: list[int]


class _Node:
    """One piece. `chain`: the frame it was last hashed in, the hashes, the tokens that fill no block yet."""

    __slots__ = ("chain", "number", "size_bytes", "tokens")

    def __init__(self, number: int, tokens: bytes) -> None:
        self.number = number
        self.tokens = tokens
        self.chain: tuple[Frame, list[int], bytes] | None = None
        self.size_bytes = 0


# gc=False: nodes refer to nothing but bytes and numbers, so it can be part of no cycle.
class Begun(msgspec.Struct, frozen=True, gc=False):
    """A text as far as it is known (`nodes`), and the rest in pieces; `made`: the tokens of those that known
    words make up.
    """

    nodes: list[_Node]
    pieces: list[str]
    made: list[bytes | None]

    @property
    def left(self) -> list[str]:
        """What is left to tokenise."""
        return [piece for piece, tokens in zip(self.pieces, self.made, strict=True) if tokens is None]


class TokenCache:
    """May be used from several threads. Holds about `capacity_bytes` (0: nothing is kept)."""

    def __init__(self, tokenise: Tokenise, cuts: Cuts, capacity_bytes: int) -> None:
        self._tokenise = tokenise
        self._words = Words(tokenise, cuts) if cuts.before else None
        self._cuts = cuts
        self._capacity_bytes = capacity_bytes
        self._nodes: OrderedDict[tuple[int, str], _Node] = OrderedDict()
        self._lock = Lock()
        self._last_number = _FIRST
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._nodes)

    def begin(self, text: str) -> Begun:
        """Find what is known of `text`: microseconds for each thousand characters."""
        nodes: list[_Node] = []
        keys: list[tuple[int, str]] = []
        pieces: list[str] = []
        at, parent, after = 0, _FIRST, self._cuts.next
        while at < len(text):
            end = after(text, at)
            piece = text[at:end]
            at = end
            node = None if pieces else self._nodes.get((parent, piece))
            if node is None:
                pieces.append(piece)
            else:
                nodes.append(node)
                keys.append((parent, piece))
                parent = node.number
        self._touch(keys)
        most = _AT_ONCE_CHARS if load.compiled is not None else _AT_ONCE_PYTHON
        if self._words is not None and sum(map(len, pieces)) <= most:
            return Begun(nodes, pieces, self._words.join(pieces))
        return Begun(nodes, pieces, [None] * len(pieces))

    def complete(self, begun: Begun, frame: Frame) -> Tokenised:
        """Count and hash the text: what is not known of it is tokenised, and known from now on."""
        nodes = begun.nodes
        cached = sum(len(node.tokens) for node in nodes) // TOKEN_BYTES
        if begun.pieces:
            nodes = nodes + self._new_nodes(begun, frame.block_size or _USUAL_BLOCK)
        size = len(frame.before) + sum(len(node.tokens) for node in nodes) + len(frame.after)
        return Tokenised(size // TOKEN_BYTES, cached, _hashes(nodes, frame) if frame.block_size else [])

    def packed(self, begun: Begun) -> bytes:
        """The tokens of the text, packed; what is not known of it is tokenised, and known from now on."""
        nodes = begun.nodes
        if begun.pieces:
            nodes = nodes + self._new_nodes(begun, _USUAL_BLOCK)
        return b"".join([node.tokens for node in nodes])

    def _new_nodes(self, begun: Begun, block_size: int) -> list[_Node]:
        left = begun.left
        rest = iter(self._tokens(left) if left else ())
        made = [next(rest) if tokens is None else tokens for tokens in begun.made]
        return self._keep(begun.nodes[-1].number if begun.nodes else _FIRST, begun.pieces, made, block_size)

    def _tokens(self, pieces: list[str]) -> list[bytes]:
        if self._words is not None:
            return self._words.tokens(pieces)
        return [pack_tokens(ids) for ids in self._tokenise(pieces)]

    def _touch(self, keys: list[tuple[int, str]]) -> None:
        """Make them the last to go, those nearer to the root after those that hang on them."""
        with self._lock:
            for key in reversed(keys):
                if key in self._nodes:
                    self._nodes.move_to_end(key)

    def _keep(
        self, parent: int, pieces: Sequence[str], made: Sequence[bytes], block_size: int
    ) -> list[_Node]:
        """New nodes below the one numbered `parent`; kept as far as there is room, also for their hashes."""
        nodes: list[_Node] = []
        keys: list[tuple[int, str]] = []
        with self._lock:
            for piece, tokens in zip(pieces, made, strict=True):
                keys.append((parent, piece))
                self._last_number = parent = self._last_number + 1
                nodes.append(_Node(parent, tokens))
            for key, node in zip(reversed(keys), reversed(nodes), strict=True):
                node.size_bytes = _NODE_BYTES + sys.getsizeof(key[1]) + len(node.tokens)
                node.size_bytes += len(node.tokens) // TOKEN_BYTES * _HASH_BYTES // block_size
                replaced = self._nodes.pop(key, None)
                self.size_bytes += node.size_bytes - (replaced.size_bytes if replaced else 0)
                self._nodes[key] = node
            while self.size_bytes > self._capacity_bytes:
                self.size_bytes -= self._nodes.popitem(last=False)[1].size_bytes
        return nodes


def _hashes(nodes: list[_Node], frame: Frame) -> list[int]:
    hashes: list[int] = []
    rest = frame.before
    for node in nodes:
        chain = node.chain
        if chain is None or (chain[0] is not frame and chain[0] != frame):
            chain = node.chain = _extend(frame, hashes, rest + node.tokens)
        hashes += chain[1]
        rest = chain[2]
    if frame.after:
        hashes += _extend(frame, hashes, rest + frame.after)[1]
    return hashes


def _extend(frame: Frame, hashes: list[int], data: bytes) -> tuple[Frame, list[int], bytes]:
    """The blocks of `data` that follow those of `hashes`."""
    new = sequence_hashes(data, frame.block_size, hashes[-1] if hashes else frame.root)
    return frame, new, data[len(new) * frame.block_size * TOKEN_BYTES :]
