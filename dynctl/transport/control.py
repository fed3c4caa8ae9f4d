"""Calls with an answer over ZeroMQ (ROUTER/DEALER, CURVE): matched by number, each with a deadline."""

from __future__ import annotations

import asyncio
import logging
import struct
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

import msgspec
import zmq

from dynctl.errors import (
    CodecError,
    ConnectFailed,
    DeadlineExceeded,
    DynctlError,
    PeerLost,
    Rejected,
    TransportError,
)
from dynctl.protocol.control import Call, Reply
from dynctl.transport.keys import Keys
from dynctl.transport.sockets import Channel, Frames, ServerContext, bind, client_socket, connect

logger = logging.getLogger(__name__)

T = TypeVar("T")
Handler = Callable[[str, msgspec.Raw], Awaitable[msgspec.Struct | None]]

_MAX_CALLS = 4096
_HANDLER_DEADLINE_S = 60.0
_encoder = msgspec.msgpack.Encoder()
_MONITORED = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


def read_body(body: msgspec.Raw, kind: type[T]) -> T:
    """The call's body as `kind`. Raises CodecError when it is not one."""
    try:
        return msgspec.msgpack.decode(body, type=kind)
    except msgspec.DecodeError as error:
        raise CodecError(f"not a {kind.__name__}: {error}") from error


class ControlServer:
    """Answers calls: `handler` gets the op and the raw body (see `read_body`) and returns the answer.

    A DynctlError of the handler goes to the caller as that error; anything else it raises is logged with its
    traceback and answered with a plain error. Use inside a running loop.
    """

    def __init__(self, keys: Keys, endpoint: str, handler: Handler) -> None:
        self._keys = keys
        self._endpoint = endpoint
        self._handler = handler
        self._decoder = msgspec.msgpack.Decoder(Call)
        self._context: ServerContext | None = None
        self._channel: Channel | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> str:
        """Bind; returns the endpoint with its real port. Raises PortInUse."""
        context = ServerContext(self._keys)
        socket = context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        try:
            bound = bind(socket, self._endpoint)
        except DynctlError:
            context.close()
            raise
        self._context = context
        self._channel = Channel(socket, self._receive)
        return bound

    async def close(self) -> None:
        """Stop answering; calls being answered are cancelled."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._context is not None:
            self._context.close()
            self._context = None

    def _receive(self, frames: Frames) -> None:
        sender = frames[0]
        try:
            call = self._decoder.decode(frames[-1] if len(frames) == 2 else b"")
        except msgspec.DecodeError as error:
            logger.warning("call.malformed bytes=%d error=%s", sum(map(len, frames)), error)
            self._answer(sender, Reply(id=0, error=CodecError.kind, message=f"not a call: {error}"))
            return
        if len(self._tasks) >= _MAX_CALLS:
            busy = f"more than {_MAX_CALLS} calls at a time"
            self._answer(sender, Reply(id=call.id, error=Rejected.kind, message=busy))
            return
        task = asyncio.get_running_loop().create_task(self._serve(sender, call))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, sender: bytes, call: Call) -> None:
        try:
            async with asyncio.timeout(_HANDLER_DEADLINE_S):
                answer = await self._handler(call.op, call.body)
            reply = Reply(id=call.id, body=msgspec.Raw(_encoder.encode(answer)))
        except TimeoutError:
            logger.error("call.late op=%s", call.op)
            late = f"{call.op} took longer than {_HANDLER_DEADLINE_S:g} s"
            reply = Reply(id=call.id, error=DeadlineExceeded.kind, message=late)
        except DynctlError as error:
            reply = Reply(
                id=call.id, error=error.kind, message=error.message, where=error.where, hint=error.hint
            )
        except Exception as error:
            # Top of the call's task: one broken handler must not end the server, and the caller must hear.
            logger.exception("call.failed op=%s", call.op)
            reply = Reply(id=call.id, error=DynctlError.kind, message=f"{type(error).__name__} in {call.op}")
        self._answer(sender, reply)

    def _answer(self, sender: bytes, reply: Reply) -> None:
        if self._channel is not None and not self._channel.send([sender, _encoder.encode(reply)]):
            logger.info("reply.undeliverable id=%d", reply.id)


class ControlClient:
    """Calls one server; connects and reconnects by itself. Make and use it inside a running loop.

    Any number of calls may run at once. A call waits for the connection within its own deadline, so nothing
    stale is sent when the server comes back.
    """

    def __init__(self, keys: Keys, endpoint: str) -> None:
        self.endpoint = endpoint
        self._decoder = msgspec.msgpack.Decoder(Reply)
        self._next_id = 1
        self._unsent: dict[int, bytes] = {}
        self._waiting: dict[int, asyncio.Future[Reply]] = {}
        self._refused = False
        self._closed = False
        socket = client_socket(zmq.DEALER, keys)
        socket.setsockopt(zmq.IMMEDIATE, 1)
        monitor = socket.get_monitor_socket(_MONITORED)
        self._socket = socket
        try:
            connect(socket, endpoint)
        except TransportError:
            socket.disable_monitor()
            monitor.close(linger=0)
            socket.close(linger=0)
            raise
        self._channel = Channel(socket, self._receive, self._send_unsent)
        self._monitor = Channel(monitor, self._connection_event)

    async def call(self, op: str, body: msgspec.Struct | None, reply_type: type[T], deadline_s: float) -> T:
        """The server's answer to `op`. The reply type of an op that answers nothing is `type(None)`.

        Raises ConnectFailed (never connected within the deadline), PeerLost (the connection went before the
        answer), DeadlineExceeded (sent, not answered in time), CodecError, or the error the server answered.
        """
        if self._closed:
            raise PeerLost("the client is closed", where=self.endpoint)
        number = self._next_id
        self._next_id += 1
        data = _encoder.encode(Call(id=number, op=op, body=msgspec.Raw(_encoder.encode(body))))
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        self._unsent[number] = data
        self._send_unsent()
        try:
            async with asyncio.timeout(deadline_s):
                reply = await future
        except TimeoutError:
            raise self._timed_out(op, number, deadline_s) from None
        finally:
            self._waiting.pop(number, None)
            self._unsent.pop(number, None)
        if reply.error:
            raise _error_of(reply, self.endpoint)
        return read_body(reply.body, reply_type)

    def close(self) -> None:
        """Close; calls that wait end with PeerLost."""
        if self._closed:
            return
        self._closed = True
        # In this order: an event for a reader that has gone would stop the thread that moves all messages.
        self._socket.disable_monitor()
        self._monitor.close()
        self._channel.close()
        self._fail("the client was closed")

    def _timed_out(self, op: str, number: int, deadline_s: float) -> TransportError:
        if number not in self._unsent:
            return DeadlineExceeded(f"no answer to {op} within {deadline_s:g} s", where=self.endpoint)
        if self._refused:
            return ConnectFailed(f"{op}: the peer refused our keys", where=self.endpoint)
        return ConnectFailed(f"{op}: no connection within {deadline_s:g} s", where=self.endpoint)

    def _send_unsent(self) -> None:
        while self._unsent and not self._closed:
            number = next(iter(self._unsent))
            if not self._channel.send([self._unsent[number]]):
                return
            del self._unsent[number]

    def _receive(self, frames: Frames) -> None:
        try:
            reply = self._decoder.decode(frames[-1])
        except msgspec.DecodeError as error:
            logger.warning("reply.malformed from=%s error=%s", self.endpoint, error)
            return
        future = self._waiting.get(reply.id)
        if future is None:
            logger.info("reply.late from=%s id=%d %s", self.endpoint, reply.id, reply.message)
        elif not future.done():
            future.set_result(reply)

    def _connection_event(self, frames: Frames) -> None:
        event, _ = struct.unpack("=HI", frames[0][:6])
        if event == zmq.EVENT_DISCONNECTED:
            self._channel.drain()  # answers that came before the end
            self._fail("the connection was lost", sent_only=True)
        else:
            self._refused = event != zmq.EVENT_HANDSHAKE_SUCCEEDED

    def _fail(self, why: str, *, sent_only: bool = False) -> None:
        for number, future in self._waiting.items():
            if not future.done() and not (sent_only and number in self._unsent):
                future.set_exception(PeerLost(why, where=self.endpoint))


def _kinds(root: type[DynctlError]) -> Iterator[type[DynctlError]]:
    yield root
    for child in root.__subclasses__():
        yield from _kinds(child)


def _error_of(reply: Reply, endpoint: str) -> DynctlError:
    """The error of that kind; an unknown kind becomes the root of the tree."""
    kind = next((k for k in _kinds(DynctlError) if k.kind == reply.error), DynctlError)
    return kind(reply.message, where=reply.where or endpoint, hint=reply.hint)
