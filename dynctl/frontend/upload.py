"""A form with files (multipart/form-data): the few fields that routing needs; its bytes stay as they are."""

from __future__ import annotations

import re
from collections.abc import Iterable

import msgspec

from dynctl.errors import RequestError
from dynctl.frontend.body import Body

_BOUNDARY = re.compile(rb'boundary=(?:"([^"\r\n]{1,70})"|([^\s;,"]{1,70}))', re.IGNORECASE)
_NAME = re.compile(rb'[;\s]name="([^"\r\n]*)"')
_READ = (b"model", b"stream")
_VALUE_BYTES = 512
_MOST_PARTS = 64


class Upload(Body):
    """A form as it came; `fields` holds only what is read here."""

    __slots__ = ("content_type",)

    def __init__(self, original: bytes, fields: dict[str, msgspec.Raw], content_type: bytes) -> None:
        super().__init__(original, fields)
        self.content_type = content_type

    @classmethod
    def read(cls, data: bytes, content_type: bytes) -> Upload:
        """Look into a form. Raises RequestError for bytes that are none."""
        found = _BOUNDARY.search(content_type)
        if found is None:
            raise RequestError(
                "the form has no boundary", hint="content-type: multipart/form-data; boundary=..."
            )
        return cls(data, _fields(data, b"--" + (found[1] or found[2])), content_type)

    def without(self, names: Iterable[str]) -> Body:
        """Itself: engines take nothing of what only dynctl may say from a form."""
        return self


def is_form(content_type: bytes | None) -> bool:
    """Whether a body of this type is a form with files."""
    return content_type is not None and content_type.lower().startswith(b"multipart/form-data")


def _fields(data: bytes, delimiter: bytes) -> dict[str, msgspec.Raw]:
    fields: dict[str, msgspec.Raw] = {}
    start = data.find(delimiter)
    for _ in range(_MOST_PARTS):
        end = data.find(b"\r\n" + delimiter, start)
        if start < 0 or end < 0:
            break
        head_end = data.find(b"\r\n\r\n", start, end)
        if head_end > 0 and end - head_end - 4 <= _VALUE_BYTES:
            name = _NAME.search(data, start, head_end)
            if name is not None and name[1] in _READ:
                fields[name[1].decode()] = _value(data[head_end + 4 : end], name[1])
        start = end + 2
    else:
        raise RequestError(f"the form has more than {_MOST_PARTS} parts")
    if start < 0 or not data.startswith(delimiter + b"--", start):
        raise RequestError("the form is not whole: its closing boundary is missing")
    return fields


def _value(raw: bytes, name: bytes) -> msgspec.Raw:
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"`{name.decode()}` is not UTF-8", where=name.decode()) from error
    if name == b"stream":
        return msgspec.Raw(b"true" if text.strip().lower() in ("true", "1") else b"false")
    return msgspec.Raw(msgspec.json.encode(text))
