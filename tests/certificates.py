"""Certificates for tests, made by openssl: for localhost and 127.0.0.1, signed by themselves."""

from __future__ import annotations

import subprocess
from pathlib import Path

_VALID = ("20200101000000Z", "20950101000000Z")

_CA = """[ca]
default_ca = this
[this]
database = {folder}/index
serial = {folder}/serial
new_certs_dir = {folder}
default_md = sha256
policy = any
x509_extensions = names
[any]
commonName = supplied
[names]
subjectAltName = DNS:{name},IP:127.0.0.1
"""


def make_certificate(
    folder: Path, *, dates: tuple[str, str] = _VALID, password: str = "", name: str = "localhost"
) -> tuple[Path, Path]:
    """Certificate and key in `folder`, valid from and to `dates`."""
    folder.mkdir(parents=True, exist_ok=True)
    cert, key, ask = folder / "cert.pem", folder / "key.pem", folder / "ask.pem"
    hidden = ["-passout", f"pass:{password}"] if password else ["-nodes"]
    _openssl(
        "req", "-new", "-newkey", "rsa:2048", *hidden, "-keyout", key, "-out", ask, "-subj", f"/CN={name}"
    )
    (folder / "index").write_text("")
    (folder / "serial").write_text("01\n")
    config = folder / "ca.cnf"
    config.write_text(_CA.format(folder=folder, name=name))
    opened = ["-passin", f"pass:{password}"] if password else []
    _openssl(
        *("ca", "-batch", "-selfsign", "-config", config, "-keyfile", key, *opened, "-in", ask, "-out", cert),
        *("-startdate", dates[0], "-enddate", dates[1], "-notext"),
    )
    return cert, key


def _openssl(*argv: object) -> None:
    subprocess.run(["openssl", *map(str, argv)], check=True, capture_output=True)
