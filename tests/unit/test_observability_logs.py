from __future__ import annotations

import logging

import pytest

from dynctl.observability.logs import PlainFormatter


@pytest.mark.parametrize("hostile", ["a\nb", "a\r\nb", "a\x1b[2Kb", "a\x00b", "a\u2028b", "a\x85b"])
def test_what_a_client_sent_begins_no_log_line_of_its_own(hostile: str) -> None:
    record = logging.LogRecord("n", logging.INFO, "f", 1, "request.refused why=%s", (hostile,), None)
    line = PlainFormatter("frontend-0").format(record)
    assert line.isprintable()
    assert "why=a\\" in line


def test_words_beyond_ascii_stay_readable() -> None:
    record = logging.LogRecord("n", logging.INFO, "f", 1, "model=%s", ("modèle-é",), None)
    assert PlainFormatter("x").format(record).endswith("model=modèle-é")
