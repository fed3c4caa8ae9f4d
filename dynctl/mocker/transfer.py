"""Both ends of a KV transfer between mockers, over the prefill mocker's own HTTP server.

Decode claims the blocks of a prefill, spends the time the move takes, and releases them. A claim that breaks
the contract, or a prefill engine that has gone, fails the request on decode.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from dynctl.errors import TransportError
from dynctl.http.client import Client, Origin, Response
from dynctl.mocker.leases import TransferRefused
from dynctl.mocker.rank import Rank
from dynctl.mocker.scheduler import Sequence as Running

CLAIM: Final = "/mock/transfer/claim"
RENEW: Final = "/mock/transfer/renew"
RELEASE: Final = "/mock/transfer/release"
_CALL_S: Final = 5.0
"""Deadline of one call to a prefill engine: the time-out of vLLM's handshake."""
_NEEDED: Final = ("remote_engine_id", "remote_request_id", "remote_host", "remote_port", "tp_size")


class TransferCall(msgspec.Struct, frozen=True, kw_only=True):
    """What decode tells prefill: which blocks, and for which prompt and model it wants them."""

    engine_id: str
    request_id: str
    digest: str = ""
    model: str = ""
    block_size: int = 0


class TransferError(msgspec.Struct, frozen=True, kw_only=True):
    """Prefill's refusal."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Source:
    """Where a prompt's KV is, out of `kv_transfer_params`."""

    origin: Origin
    engine_id: str
    request_id: str
    cached_tokens: int


def prompt_digest(tokens: Sequence[int]) -> str:
    """Identifies a prompt by its token ids."""
    return hashlib.sha256(array("I", tokens).tobytes()).hexdigest()


def read_source(params: dict[str, Any]) -> Source:
    """The source named by complete parameters. Raises TransferRefused("incomplete") otherwise.

    The real engine hangs for ever, or dies, on parameters that lack one of these.
    """
    missing = [name for name in _NEEDED if params.get(name) in (None, "")]
    groups = params.get("remote_block_ids")
    if not (isinstance(groups, list) and any(isinstance(group, list) and group for group in groups)):
        missing.append("remote_block_ids")
    if missing:
        raise TransferRefused("incomplete", f"kv_transfer_params lack {', '.join(missing)}")
    return Source(
        origin=Origin("http", str(params["remote_host"]), int(params["remote_port"])),
        engine_id=str(params["remote_engine_id"]),
        request_id=str(params["remote_request_id"]),
        cached_tokens=int(params.get("remote_prefill_cached_tokens") or 0),
    )


class PrefillSide:
    """Answers decode engines' calls. `ranks` by engine id; `violations` counts refusals by reason."""

    def __init__(self, ranks: dict[str, Rank], model: str, block_size: int) -> None:
        self.violations: Counter[str] = Counter()
        self._ranks = ranks
        self._model = model
        self._block_size = block_size

    def answer(self, path: str, body: bytes, now_s: float) -> None:
        """Carry out a call. Raises TransferRefused (counted), msgspec.DecodeError for other bodies."""
        call = msgspec.json.decode(body, type=TransferCall)
        try:
            self._carry_out(path, call, now_s)
        except TransferRefused as refusal:
            self.violations[refusal.reason] += 1
            raise

    def _carry_out(self, path: str, call: TransferCall, now_s: float) -> None:
        rank = self._ranks.get(call.engine_id)
        if rank is None:
            raise TransferRefused("engine", f"engine {call.engine_id} is not here; it was replaced")
        pins = rank.scheduler.pins
        if path == RELEASE:
            rank.unpin(call.request_id)
        elif path == RENEW:
            pins.renew(call.request_id, now_s)
        else:
            if (call.model, call.block_size) != (self._model, self._block_size):
                raise TransferRefused(
                    "model",
                    f"decode runs {call.model} with blocks of {call.block_size}, "
                    f"prefill {self._model} with blocks of {self._block_size}",
                )
            pins.claim(call.request_id, call.digest, now_s)


class DecodeSide:
    """Calls prefill engines. Every failure is a TransferRefused, counted in `violations`."""

    def __init__(self, client: Client, model: str, block_size: int) -> None:
        self.violations: Counter[str] = Counter()
        self._client = client
        self._model = model
        self._block_size = block_size

    async def claim(self, source: Source, seq: Running) -> None:
        """Take the right to read a prefill's blocks."""
        digest = prompt_digest(seq.tokens[: seq.prompt_len])
        await self._call(CLAIM, source, digest)

    async def release(self, source: Source) -> None:
        """The blocks were read, or will not be."""
        await self._call(RELEASE, source, "")

    async def renew(self, source: Source) -> None:
        """A sign of life while the request waits here."""
        await self._call(RENEW, source, "")

    def refuse(self, refusal: TransferRefused) -> None:
        """Count a refusal made on this side."""
        self.violations[refusal.reason] += 1

    async def _call(self, path: str, source: Source, digest: str) -> None:
        call = TransferCall(
            engine_id=source.engine_id,
            request_id=source.request_id,
            digest=digest,
            model=self._model,
            block_size=self._block_size,
        )
        try:
            response = await self._client.request(
                source.origin, "POST", path, body=msgspec.json.encode(call), timeout_s=_CALL_S
            )
        except TransportError as error:
            self.violations["unreachable"] += 1
            raise TransferRefused("unreachable", f"prefill engine {source.origin}: {error}") from error
        if response.status != 200:
            refusal = _refusal(response)
            self.violations[refusal.reason] += 1
            raise refusal


def _refusal(response: Response) -> TransferRefused:
    try:
        told = msgspec.json.decode(response.body, type=TransferError)
    except msgspec.DecodeError:
        return TransferRefused("unreachable", f"prefill answered a transfer call with {response.status}")
    return TransferRefused(told.reason, told.message)
