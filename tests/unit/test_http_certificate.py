from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from dynctl.errors import LaunchError
from dynctl.http.certificate import fault, load, server_context
from tests.certificates import make_certificate

pytestmark = pytest.mark.debian("openssl")


def test_a_good_pair_has_no_fault(tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path)
    assert fault(str(cert), str(key)) == ""
    assert server_context(str(cert), str(key)).minimum_version == ssl.TLSVersion.TLSv1_2


@pytest.mark.parametrize(
    ("dates", "told"),
    [
        (("20200101000000Z", "20200102000000Z"), "expired"),
        (("20900101000000Z", "20910101000000Z"), "not valid yet"),
    ],
)
def test_dates_that_no_client_accepts_are_told(tmp_path: Path, dates: tuple[str, str], told: str) -> None:
    cert, key = make_certificate(tmp_path, dates=dates)
    assert told in fault(str(cert), str(key))


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path)
    _, other = make_certificate(tmp_path / "other")
    encrypted = make_certificate(tmp_path / "encrypted", password="secret")[1]
    junk = tmp_path / "junk.pem"
    junk.write_text("hello")
    for pair, words in (
        ((cert, other), "another certificate"),
        ((cert, encrypted), "encrypted"),
        ((junk, key), "not PEM"),
        ((cert, junk), "not PEM"),
        ((cert, tmp_path / "nope"), "No such file"),
    ):
        with pytest.raises(LaunchError) as caught:
            server_context(str(pair[0]), str(pair[1]))
        assert words in str(caught.value), pair
        assert str(tmp_path) in str(caught.value)


def test_a_bad_renewal_leaves_the_certificate_that_is_there(tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path)
    context = server_context(str(cert), str(key))
    _, other = make_certificate(tmp_path / "other")
    with pytest.raises(LaunchError):
        load(context, str(cert), str(other))
    client, server = ssl.MemoryBIO(), ssl.MemoryBIO()
    trusting = ssl.create_default_context(cafile=str(cert))
    one = trusting.wrap_bio(client, server, server_hostname="localhost")
    two = context.wrap_bio(server, client, server_side=True)
    for end in (one, two, one, two):
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            continue
    assert one.getpeercert()
