"""The simulated engine: its ranks, the requests in flight, and both sides of KV transfers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from dynctl.http.client import Client
from dynctl.http.server import Exchange
from dynctl.mocker.answers import Answer
from dynctl.mocker.blocks import BlockPool
from dynctl.mocker.faults import Faults
from dynctl.mocker.leases import PinBoard, TransferRefused
from dynctl.mocker.options import Options
from dynctl.mocker.rank import Rank
from dynctl.mocker.requests import ApiError, Generation, Serving
from dynctl.mocker.scheduler import Limits, Scheduler
from dynctl.mocker.scheduler import Sequence as Running
from dynctl.mocker.transfer import DecodeSide, PrefillSide, Source, prompt_digest, read_source
from dynctl.mocker.wire import Envelope
from dynctl.perfmodel.profile import Profile

logger = logging.getLogger(__name__)

_WAITING_WEIGHT: Final = 4
"""When a rank is chosen a waiting sequence counts as so many running ones, as in vLLM's balancing."""


@dataclass(slots=True, eq=False)
class Flight:
    """One request at work: its answer, the rank and sequences for it, where its prompt KV comes from."""

    answer: Answer
    rank: Rank
    source: Source | None
    seqs: list[Running] = field(default_factory=list)


class SimulatedEngine:
    """Everything behind the HTTP server. Make it inside a running loop, `run` it, `close` it at the end.

    `fatal` is called when the process cannot go on: a crash asked for, or a bug in a rank's loop.
    """

    def __init__(
        self, options: Options, serving: Serving, profile: Profile, fatal: Callable[[], None]
    ) -> None:
        self.options = options
        self.serving = serving
        self.profile = profile
        self.faults = Faults(
            crash_after_tokens=options.fault_crash_after_tokens,
            hang=options.fault_hang,
            refuse=options.fault_refuse,
            event_loss=options.fault_event_loss,
        )
        self.draining = False
        self.address = ("", 0)
        self._fatal = fatal
        self.ranks = [self._make_rank(number) for number in range(options.data_parallel_size)]
        base = secrets.token_hex(16)
        single = len(self.ranks) == 1
        self.engine_ids = [base if single else f"{base}_dp{rank.number}" for rank in self.ranks]
        by_id = dict(zip(self.engine_ids, self.ranks, strict=True))
        self.prefill_side = PrefillSide(by_id, serving.model, options.block_size)
        self._client = Client()
        self.decode_side = DecodeSide(self._client, serving.model, options.block_size)
        self._flights: dict[Running, Flight] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._settled = asyncio.Event()

    @property
    def inflight(self) -> int:
        """Sequences not answered yet."""
        return len(self._flights)

    def run(self) -> None:
        """Start every rank's loop."""
        for rank in self.ranks:
            self._spawn(rank.run(), fatal=True)

    async def settled(self, timeout_s: float) -> bool:
        """Wait until no request is in flight; False when one still is after `timeout_s`."""
        self._settled.clear()
        if self._flights:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._settled.wait(), timeout_s)
        return not self._flights

    async def close(self) -> None:
        """Stop the loops and close connections to other engines."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.close()

    def choose_rank(self, wanted: bytes | None) -> Rank:
        """The rank a header asks for, else the least loaded. Raises ApiError 400 for an unknown one."""
        if wanted is None:
            return min(self.ranks, key=_load)
        number = int(wanted) if wanted.isdigit() else -1
        if not 0 <= number < len(self.ranks):
            raise ApiError(
                f"data_parallel_rank {wanted.decode('latin-1')} is not in 0..{len(self.ranks) - 1}"
            )
        return self.ranks[number]

    async def generate(self, exchange: Exchange, asked: Generation, rank: Rank, request_id: str) -> None:
        """Serve a request to its end. Raises ApiError as long as nothing was sent; later it is told there."""
        source = self._read_transfer(asked)
        kind = "chatcmpl" if asked.chat else "cmpl"
        envelope = Envelope(
            f"{kind}-{request_id}", asked.chat, asked.adapter or self.serving.model, int(time.time())
        )
        answer = Answer(exchange, envelope, asked, self.serving.vocabulary, self._offer)
        flight = Flight(answer, rank, source)
        if source is not None:
            answer.cached_tokens = source.cached_tokens
        for prompt, limit in zip(asked.prompts, asked.max_tokens, strict=True):
            for _ in range(asked.choices):
                flight.seqs.append(self._sequence(flight, prompt, limit))
        answer.open(((b"x-request-id", request_id.encode("latin-1", "replace")),))
        exchange.on_disconnect = lambda: self._cancel(flight)
        if self.draining:
            self._abort(flight)
            return
        for seq in flight.seqs:
            self._flights[seq] = flight
            rank.submit(seq)
        if source is not None:
            self._spawn(self._heartbeat(flight, source))
        try:
            await answer.done
        finally:
            for seq in flight.seqs:
                self._flights.pop(seq, None)
            if not self._flights:
                self._settled.set()

    def abort_all(self) -> None:
        """End all requests with finish_reason "abort"."""
        for flight in set(self._flights.values()):
            self._abort(flight)

    def spare(self, params: object) -> None:
        """A request was refused before it began: let its prefill engine free the blocks."""
        if self.options.receives_kv and isinstance(params, dict) and params.get("do_remote_prefill"):
            with contextlib.suppress(TransferRefused):  # params that name nobody leave nobody to tell
                self._spawn(self._release(read_source(params)))

    def reset_prefix_cache(self) -> bool:
        """Forget the cached blocks of every rank; False if one is at work."""
        if any(rank.scheduler.pool.usage for rank in self.ranks):
            return False
        return all([rank.scheduler.pool.reset() for rank in self.ranks])

    def _make_rank(self, number: int) -> Rank:
        options = self.options
        pool = BlockPool(options.num_gpu_blocks_override, options.block_size, options.enable_prefix_caching)
        limits = Limits(options.max_num_seqs, options.max_num_batched_tokens, options.enable_chunked_prefill)
        scheduler = Scheduler(limits, pool, PinBoard(options.lease_s))
        rank = Rank(number, scheduler, self.profile, options.speedup, self.faults)
        rank.crash = self._fatal
        rank.fetch = self._fetch
        return rank

    def _sequence(self, flight: Flight, prompt: Sequence[int], limit: int) -> Running:
        asked = flight.answer.asked
        choice = flight.answer.add(prompt)
        every = 0 if asked.ignore_eos else self.options.mean_output_tokens
        keep = self.options.sends_kv and bool((asked.transfer or {}).get("do_remote_decode"))
        return Running(
            id=f"{flight.answer.envelope.id}-0-{secrets.token_hex(4)}",
            tokens=list(prompt),
            max_tokens=limit,
            source=self.serving.vocabulary.source(prompt, every),
            owner=choice,
            min_tokens=asked.min_tokens,
            eos=self.serving.vocabulary.eos if every else -1,
            salt=asked.salt,
            adapter=asked.adapter,
            media=asked.media,
            pin_digest=prompt_digest(prompt) if keep else "",
            remote=flight.source is not None,
        )

    # --- prefill and decode apart

    def _read_transfer(self, asked: Generation) -> Source | None:
        """Where the prompt's KV comes from. Raises ApiError 500 for parameters that are not complete."""
        params = asked.transfer
        if not params or not self.options.receives_kv or not params.get("do_remote_prefill"):
            return None
        if asked.choices > 1 or len(asked.prompts) > 1:
            raise ApiError("one prompt and one choice per transfer", param="kv_transfer_params")
        try:
            return read_source(params)
        except TransferRefused as refusal:
            self.decode_side.refuse(refusal)
            raise _transfer_failed(refusal) from refusal

    def _offer(self, seq: Running) -> dict[str, Any] | None:
        """What a decode engine needs to pull a finished prefill's blocks; None for other sequences."""
        flight = self._flights.get(seq)
        if flight is None or seq.pinned is None:
            return None
        options = self.options
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_engine_id": self.engine_ids[flight.rank.number],
            "remote_request_id": seq.id,
            "remote_host": options.side_channel_host or self.address[0],
            "remote_port": self.address[1],
            "remote_block_ids": [seq.pinned],
            "tp_size": options.tensor_parallel_size,
            "dcp_size": 1,
            "pp_size": options.pipeline_parallel_size,
            "remote_num_tokens": seq.prompt_len,
            "remote_blocks_expiry_time": None,
            "transfer_mode": "pull",
            "remote_prefill_cached_tokens": seq.cached_tokens,
        }

    def _fetch(self, rank: Rank, seq: Running) -> None:
        flight = self._flights.get(seq)
        if flight is not None and flight.source is not None:
            self._spawn(self._pull(flight, flight.source, seq))

    async def _pull(self, flight: Flight, source: Source, seq: Running) -> None:
        """Move a prompt's KV here. The request fails when the prefill engine refuses or is gone."""
        speedup = self.options.speedup
        try:
            await self.decode_side.claim(source, seq)
            await asyncio.sleep(self.profile.transfer_s(seq.remote_tokens) / speedup if speedup else 0)
            await self.decode_side.release(source)
        except TransferRefused as refusal:
            logger.error("transfer.failed request=%s reason=%s %s", seq.id, refusal.reason, refusal.message)
            flight.rank.stop(seq, "error")
            flight.answer.failed(_transfer_failed(refusal))
            return
        flight.rank.received(seq)

    async def _heartbeat(self, flight: Flight, source: Source) -> None:
        """Keep the lease while the request waits for its blocks here: every sixth of it, as vLLM does."""
        seq = flight.seqs[0]
        await asyncio.sleep(self.options.lease_s / 6)
        while not seq.admitted and not seq.finish:
            with contextlib.suppress(TransferRefused):  # counted where raised; the claim will tell the client
                await self.decode_side.renew(source)
            await asyncio.sleep(self.options.lease_s / 6)

    async def _release(self, source: Source) -> None:
        with contextlib.suppress(TransferRefused):  # counted where raised; the lease will end by itself
            await self.decode_side.release(source)

    # --- ends

    def _cancel(self, flight: Flight) -> None:
        """The client has gone: free what its sequences hold."""
        for seq in flight.seqs:
            waits = flight.source is not None and not seq.admitted and not seq.finish
            if seq in self._flights:
                flight.rank.stop(seq, "abort")
            if waits and flight.source is not None:
                self._spawn(self._release(flight.source))
        flight.answer.dropped()

    def _abort(self, flight: Flight) -> None:
        for seq in flight.seqs:
            if seq in self._flights:
                flight.rank.stop(seq, "abort")
            seq.owner.on_abort("abort")

    def _spawn(self, work: Coroutine[Any, Any, None], *, fatal: bool = False) -> None:
        """Run a task of the engine's own. When a `fatal` one fails, nobody would be answered any more."""

        def done(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                logger.error("task.failed", exc_info=error)
                if fatal:
                    self._fatal()

        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(done)


def _load(rank: Rank) -> int:
    scheduler = rank.scheduler
    return len(scheduler.waiting) * _WAITING_WEIGHT + scheduler.unfinished


def _transfer_failed(refusal: TransferRefused) -> ApiError:
    text = f"KV transfer failed ({refusal.reason}): {refusal.message}"
    return ApiError(text, status=500, kind="InternalServerError", param=None)
