"""Messages to whoever listens (PUB/SUB, CURVE). Lossy by nature: what matters carries a number."""

from __future__ import annotations

import logging
from collections.abc import Callable

import msgspec
import zmq

from dynctl.errors import DynctlError
from dynctl.transport.keys import Keys
from dynctl.transport.sockets import Channel, Frames, ServerContext, Socket, bind, client_socket, connect

logger = logging.getLogger(__name__)


class Publisher:
    """Sends each message to all who subscribed to its topic. Use inside a running loop."""

    def __init__(self, keys: Keys, endpoint: str) -> None:
        self._keys = keys
        self._endpoint = endpoint
        self._encoder = msgspec.msgpack.Encoder()
        self._context: ServerContext | None = None
        self._socket: Socket | None = None

    def start(self) -> str:
        """Bind; returns the endpoint with its real port. Raises PortInUse."""
        context = ServerContext(self._keys)
        socket = context.socket(zmq.PUB)
        try:
            bound = bind(socket, self._endpoint)
        except DynctlError:
            context.close()
            raise
        self._context, self._socket = context, socket
        return bound

    def publish(self, topic: bytes, body: msgspec.Struct) -> None:
        """Send now. A reader that cannot keep up loses messages, and sees it by their numbers."""
        if self._socket is not None:
            self._socket.send_multipart((topic, self._encoder.encode(body)), zmq.NOBLOCK)

    def close(self) -> None:
        """Stop publishing."""
        if self._socket is not None:
            self._socket.close(linger=0)
            self._socket = None
        if self._context is not None:
            self._context.close()
            self._context = None


class Subscriber:
    """Hands each message of the publishers it is connected to to `on_message(topic, body)`.

    `topics` are prefixes; an empty tuple means every topic. `on_message` must not raise: bodies are read with
    `read_body` rules in mind, a message it cannot read is its own to log. Make it inside a running loop.
    What comes within `gather_s` seconds of a message is taken with it.
    """

    def __init__(
        self,
        keys: Keys,
        on_message: Callable[[bytes, bytes], None],
        topics: tuple[bytes, ...] = (),
        *,
        gather_s: float = 0.0,
    ) -> None:
        self._on_message = on_message
        self._socket = client_socket(zmq.SUB, keys)
        for topic in topics or (b"",):
            self._socket.setsockopt(zmq.SUBSCRIBE, topic)
        self._endpoints: set[str] = set()
        self._channel = Channel(self._socket, self._receive, gather_s=gather_s)

    def connect(self, endpoint: str) -> None:
        """Listen to one more publisher; reconnects by itself. No effect when it is connected already."""
        if endpoint not in self._endpoints:
            connect(self._socket, endpoint)
            self._endpoints.add(endpoint)
            self._channel.look()

    def disconnect(self, endpoint: str) -> None:
        """Stop listening to a publisher. No effect when it is not connected."""
        if endpoint in self._endpoints:
            self._endpoints.discard(endpoint)
            self._socket.disconnect(endpoint)
            self._channel.look()

    def close(self) -> None:
        """Stop listening."""
        self._channel.close()

    def _receive(self, frames: Frames) -> None:
        if len(frames) != 2:
            logger.warning("event.malformed frames=%d", len(frames))
            return
        self._on_message(frames[0], frames[1])
