"""The certificate of an HTTPS server: loaded, loaded anew, and looked at before anybody else does."""

from __future__ import annotations

import ssl
from contextlib import suppress
from pathlib import Path

from dynctl.errors import LaunchError

_NOT_YET_VALID = 9
_EXPIRED = 10
"""X509_V_ERR_CERT_NOT_YET_VALID and X509_V_ERR_CERT_HAS_EXPIRED (OpenSSL, x509_vfy.h)."""


def server_context(cert: str, key: str) -> ssl.SSLContext:
    """TLS as a server, 1.2 and later. Raises LaunchError that names the file at fault."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    load(context, cert, key)
    return context


def load(context: ssl.SSLContext, cert: str, key: str) -> None:
    """Give `context` this certificate for connections to come. Raises LaunchError; nothing changes then."""
    for file in filter(None, (cert, key)):
        try:
            Path(file).read_bytes()
        except OSError as error:
            raise LaunchError(f"the TLS file cannot be read: {error.strerror}", where=file) from error
    try:
        for target in (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), context):
            target.load_cert_chain(cert, key or None, password=_none)
    except (ssl.SSLError, ValueError) as error:
        why = next((words for sign, words in _WORDS.items() if sign in str(error)), str(error))
        raise LaunchError(
            f"the TLS certificate and its key cannot be used: {why}",
            where=f"{cert}, {key}" if key else cert,
            hint="PEM files; the key belongs to the certificate and is not encrypted",
        ) from error


_WORDS = {
    "KEY_VALUES_MISMATCH": "the key is that of another certificate",
    "NO_START_LINE": "one of them is not PEM",
    "PEM lib": "one of them is not PEM",
    "BAD_BASE64_DECODE": "one of them is damaged",
}


def _none() -> str:
    """The password of an encrypted key, for which nobody is to be asked."""
    raise ValueError("the key is encrypted")


def fault(cert: str, key: str) -> str:
    """Why every client will refuse the certificate today, "" = its dates are fine. Raises LaunchError."""
    server = server_context(cert, key)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
    client.load_verify_locations(cafile=cert)
    one, other = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (client.wrap_bio(one, other, server_side=False), server.wrap_bio(other, one, server_side=True))
    try:
        for _ in range(4):
            for end in ends:
                with suppress(ssl.SSLWantReadError):
                    end.do_handshake()
    except ssl.SSLCertVerificationError as error:
        if error.verify_code == _EXPIRED:
            return "it has expired"
        return "it is not valid yet" if error.verify_code == _NOT_YET_VALID else ""
    return ""
