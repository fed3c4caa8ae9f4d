"""ZeroMQ sockets on the running event loop, with CURVE, limits, and a close that never hangs.

A server socket lives in a context of its own together with the ZAP handler that admits one public key only;
client sockets share the process's context. A socket is used from the thread of its loop alone.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable, Sequence

import zmq
import zmq.utils.z85

from dynctl.errors import PortInUse, TransportError
from dynctl.transport.keys import Keys

logger = logging.getLogger(__name__)

Frames = list[bytes]
Socket = zmq.Socket[bytes]
Context = zmq.Context[Socket]

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""A larger message cuts its sender's connection."""
HIGH_WATER_MESSAGES = 100_000
_BATCH = 64
"""Messages taken in one go before other work of the loop gets its turn."""
_ZAP_ENDPOINT = "inproc://zeromq.zap.01"
_ZAP_DOMAIN = b"dynctl"


class Channel:
    """One socket on the running loop: `on_message` gets each message's frames, many per wake-up.

    `on_wake`, if given, is called after a round of receiving when the socket can send: the place to retry
    what could not be sent. With `gather_s`, what comes within so many seconds of a message is taken with it:
    a wake-up costs more than a message.
    """

    def __init__(
        self,
        socket: Socket,
        on_message: Callable[[Frames], None],
        on_wake: Callable[[], None] | None = None,
        *,
        gather_s: float = 0.0,
    ) -> None:
        self._socket = socket
        self._on_message = on_message
        self._on_wake = on_wake
        self._loop = asyncio.get_running_loop()
        self._fd = int(socket.getsockopt(zmq.FD))
        self._scheduled = False
        self._closed = False
        self._gather_s = gather_s
        self._gathering: asyncio.TimerHandle | None = None
        self._watch()
        self.look()

    def send(self, frames: Sequence[bytes]) -> bool:
        """Queue one message. False: no connection, or the queue is full; nothing was sent."""
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno in (errno.EAGAIN, errno.EHOSTUNREACH):
                return False
            raise
        finally:
            self.look()
        return True

    def drain(self) -> None:
        """Take what has arrived, up to a batch; the rest follows in the loop's next round."""
        self._scheduled = False
        receive, hand_on = self._socket.recv_multipart, self._on_message
        for _ in range(_BATCH):
            if self._closed:
                return
            try:
                frames = receive(zmq.NOBLOCK)
            except zmq.Again:
                break
            try:
                hand_on(frames)
            except Exception:
                # Top of the reader: one message that breaks its handler must not stop those behind it.
                logger.exception("message.failed frames=%d", len(frames))
        else:
            self.look()
        if self._on_wake is not None and not self._closed:
            self._wake(self._on_wake)

    def _watch(self) -> None:
        self._loop.add_reader(self._fd, self._gather if self._gather_s else self.drain)

    def _gather(self) -> None:
        self._loop.remove_reader(self._fd)
        self._gathering = self._loop.call_later(self._gather_s, self._gathered)

    def _gathered(self) -> None:
        self._gathering = None
        self._watch()
        self.drain()

    def close(self) -> None:
        """Stop receiving and close the socket; what was not sent yet is dropped."""
        if not self._closed:
            self._closed = True
            if self._gathering is not None:
                self._gathering.cancel()
            self._loop.remove_reader(self._fd)
            self._socket.close(linger=0)

    def _wake(self, on_wake: Callable[[], None]) -> None:
        """Only when a message would be taken: a failed try asks for the next look, without end."""
        events = int(self._socket.getsockopt(zmq.EVENTS))
        if events & zmq.POLLIN:  # looking may have swallowed its edge
            self.look()
        if events & zmq.POLLOUT:
            on_wake()

    def look(self) -> None:
        """Take soon what has arrived: any call on the socket may have swallowed the descriptor's edge."""
        if not self._scheduled and not self._closed:
            self._scheduled = True
            self._loop.call_soon(self._drain_if_open)

    def _drain_if_open(self) -> None:
        if not self._closed:
            self.drain()


class ServerContext:
    """A context whose CURVE server sockets let in the deployment's own key pair only."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._allowed = zmq.utils.z85.decode(keys.public)
        self._context: Context = zmq.Context(io_threads=1)
        gate = self._context.socket(zmq.ROUTER)
        gate.bind(_ZAP_ENDPOINT)
        self._gate = Channel(gate, self._judge)

    def socket(self, kind: int) -> Socket:
        """A CURVE server socket, limits set, not bound yet."""
        socket = self._context.socket(kind)
        set_limits(socket)
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self._keys.secret.encode("ascii"))
        socket.setsockopt(zmq.ZAP_DOMAIN, _ZAP_DOMAIN)
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        return socket

    def close(self) -> None:
        """Close the gate and every socket of this context."""
        self._gate.close()
        self._context.destroy(linger=0)

    def _judge(self, frames: Frames) -> None:
        """Answer one ZAP request (RFC 27): 200 for our public key, 400 for all else."""
        if len(frames) < 7 or frames[2] != b"1.0":
            logger.warning("zap.malformed frames=%d", len(frames))
            return
        sender, _, version, request, domain, address = frames[:6]
        mechanism, credentials = frames[7] if len(frames) > 7 else b"", frames[8:]
        allowed = domain == _ZAP_DOMAIN and mechanism == b"CURVE" and credentials == [self._allowed]
        if not allowed:
            logger.warning("peer.refused address=%s", address.decode("ascii", "replace"))
        code, text = (b"200", b"OK") if allowed else (b"400", b"unknown key")
        self._gate.send([sender, b"", version, request, code, text, b"dynctl" if allowed else b"", b""])


def client_socket(kind: int, keys: Keys) -> Socket:
    """A CURVE client socket for a server that holds the same key pair, limits set, not connected yet."""
    socket = plain_socket(kind)
    socket.setsockopt(zmq.CURVE_SERVERKEY, keys.public.encode("ascii"))
    socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public.encode("ascii"))
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret.encode("ascii"))
    return socket


def plain_socket(kind: int) -> Socket:
    """A socket without CURVE, limits set: for an engine's own publisher only."""
    context: Context = zmq.Context.instance()
    socket = context.socket(kind)
    set_limits(socket)
    return socket


def set_limits(socket: Socket) -> None:
    """Bounded queues and messages, no linger, dead peers noticed within seconds."""
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MESSAGES)
    socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MESSAGES)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.HEARTBEAT_IVL, 5_000)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 15_000)
    socket.setsockopt(zmq.HANDSHAKE_IVL, 10_000)
    socket.setsockopt(zmq.RECONNECT_IVL, 50)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1_000)


def bind(socket: Socket, endpoint: str) -> str:
    """Bind and return the endpoint with its real port. Raises PortInUse, or TransportError for all else."""
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        socket.close(linger=0)
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(f"{endpoint} is taken", hint="free the port or choose another") from error
        raise TransportError(f"cannot bind {endpoint}: {error.strerror}") from error
    bound = socket.getsockopt(zmq.LAST_ENDPOINT)
    return bound.rstrip(b"\0").decode("ascii") if isinstance(bound, bytes) else endpoint


def connect(socket: Socket, endpoint: str) -> None:
    """Connect in the background, again and again. Raises TransportError for an endpoint that is none."""
    try:
        socket.connect(endpoint)
    except zmq.ZMQError as error:
        raise TransportError(
            f"cannot connect to {endpoint!r}: {error.strerror}", hint="want tcp://address:port"
        ) from error
