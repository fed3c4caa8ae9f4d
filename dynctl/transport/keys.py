"""The secrets of a deployment: made once, kept in files that only their owner can read.

The key pair of its sockets, and the API key that its engines ask for.
"""

from __future__ import annotations

import os
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import zmq

from dynctl.errors import TransportError

_Z85_LENGTH = 40


class _KeysFile(msgspec.Struct, frozen=True, kw_only=True):
    version: int
    public: str
    secret: str


@dataclass(frozen=True, slots=True)
class Keys:
    """A CURVE key pair, Z85 text. All parts of a deployment hold the same pair; the secret is never shown."""

    public: str
    secret: str = field(repr=False)

    @classmethod
    def generate(cls) -> Keys:
        """A new random pair."""
        public, secret = zmq.curve_keypair()
        return cls(public.decode("ascii"), secret.decode("ascii"))

    @classmethod
    def load(cls, path: Path | str) -> Keys:
        """Read a pair that `save` wrote. Raises TransportError: missing, broken, or open to others."""
        return cls._parse(_read(path), str(path))

    @classmethod
    def _parse(cls, data: bytes, where: str) -> Keys:
        try:
            content = msgspec.json.decode(data, type=_KeysFile)
        except msgspec.DecodeError as error:
            raise TransportError(f"not a keys file: {error}", where=where) from error
        if content.version != 1 or len(content.public) != _Z85_LENGTH or len(content.secret) != _Z85_LENGTH:
            raise TransportError("not a keys file of version 1 with two Z85 keys", where=where)
        return cls(content.public, content.secret)

    def save(self, path: Path | str) -> None:
        """Write the pair with mode 0600, whole or not at all; a file that is there is replaced."""
        _write(path, msgspec.json.encode(_KeysFile(version=1, public=self.public, secret=self.secret)))


def save_engine_key(path: Path | str) -> None:
    """Make an API key for the engines, and write it with mode 0600."""
    _write(path, secrets.token_urlsafe(32).encode())


def load_engine_key(path: Path | str) -> str:
    """The key that `save_engine_key` wrote. Raises TransportError: missing, empty, or open to others."""
    key = _read(path).decode("ascii", "replace").strip()
    if not key:
        raise TransportError("the key file is empty", where=str(path))
    return key


def bearer(key: str) -> tuple[bytes, bytes]:
    """The header that carries an API key."""
    return (b"authorization", b"Bearer " + key.encode())


def _read(path: Path | str) -> bytes:
    where = str(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise TransportError(f"cannot read the keys: {error.strerror}", where=where) from error
    try:
        _check(os.fstat(descriptor), where)
        return os.read(descriptor, 65536)
    finally:
        os.close(descriptor)


def _check(status: os.stat_result, where: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise TransportError("the keys are not a regular file", where=where)
    if status.st_uid != os.geteuid():
        raise TransportError(
            f"the keys belong to user {status.st_uid}", where=where, hint=f"want user {os.geteuid()}"
        )
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        raise TransportError(f"the keys are open to others (mode {mode:04o})", where=where, hint="chmod 600")


def _write(path: Path | str, content: bytes) -> None:
    """Whole or not at all, with mode 0600; a file that is there is replaced."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
