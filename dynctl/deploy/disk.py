"""Every trouble with the disk ends in one message."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from dynctl.errors import LaunchError

_HINTS = {
    errno.EACCES: "the directory must be writable by this user; DYNCTL_HOME names another one",
    errno.EPERM: "the directory must be writable by this user; DYNCTL_HOME names another one",
    errno.EROFS: "DYNCTL_HOME must name a directory on a writable file system",
    errno.ENOSPC: "free some space, or let DYNCTL_HOME name a directory on another disk",
    errno.EDQUOT: "free some of the quota, or let DYNCTL_HOME name a directory on another disk",
    errno.ENOTDIR: "DYNCTL_HOME must name a directory",
    errno.EEXIST: "DYNCTL_HOME must name a directory",
}


@contextmanager
def disk(what: str) -> Iterator[None]:
    """Turn an OSError into a LaunchError that says what could not be done, where, and what would help."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        where = str(error.filename or "")
        raise LaunchError(f"{what}: {reason}", where=where, hint=_HINTS.get(error.errno or 0, "")) from error
