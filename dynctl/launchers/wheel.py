"""dynctl that runs here as a wheel: from its own files alone, without network or build tools.

The same files make the same bytes, so that the digest tells whether a host has exactly this dynctl.
"""

from __future__ import annotations

import base64
import hashlib
import io
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from dynctl.errors import LaunchError

_NAME = "dynctl"
_PACKAGE = Path(__file__).resolve().parent.parent
_EPOCH = (1980, 1, 1, 0, 0, 0)
_TAG = "Wheel-Version: 1.0\nGenerator: dynctl\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel in memory. `filename` is as pip wants it."""

    version: str
    content: bytes

    @property
    def filename(self) -> str:
        """Name of the file, with the version."""
        return f"{_NAME}-{self.version}-py3-none-any.whl"

    @property
    def sha256(self) -> str:
        """Digest of the content, in hexadecimal."""
        return hashlib.sha256(self.content).hexdigest()

    @property
    def key(self) -> str:
        """What tells this dynctl from all others: version and the start of the digest."""
        return f"{self.version}-{self.sha256[:12]}"

    @property
    def needs(self) -> tuple[str, ...]:
        """What it is installed with, as pip takes it; what only its extras need is left out."""
        with zipfile.ZipFile(io.BytesIO(self.content)) as archive:
            about = archive.read(f"{_NAME}-{self.version}.dist-info/METADATA").decode("utf-8", "replace")
        head = about.partition("\n\n")[0].splitlines()
        found = [line.partition(":")[2].strip() for line in head if line.startswith("Requires-Dist:")]
        return tuple(need for need in found if "extra ==" not in need)


def own_wheel() -> Wheel:
    """The dynctl that runs here. Raises LaunchError when its files or metadata are not there."""
    project = _PACKAGE.parent / "pyproject.toml"
    try:
        if project.is_file():
            version, files = _of_project(project)
        else:
            version, files = _of_installation()
        return Wheel(version, pack(version, files))
    except (OSError, KeyError, ValueError, metadata.PackageNotFoundError) as error:
        raise LaunchError(
            f"no wheel can be made of the dynctl that runs here: {error}",
            where=str(_PACKAGE),
            hint="install dynctl with pip, here or on the hosts",
        ) from error


def pack(version: str, files: Mapping[str, bytes]) -> bytes:
    """The wheel of these files (path in the wheel → content), its record added."""
    info = f"{_NAME}-{version}.dist-info"
    whole = {**files, f"{info}/WHEEL": _TAG.encode()}
    record = "".join(f"{name},{_digest(content)},{len(content)}\n" for name, content in sorted(whole.items()))
    whole[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, content in sorted(whole.items(), key=lambda item: (item[0].startswith(info), item[0])):
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, content)
    return made.getvalue()


def _digest(content: bytes) -> str:
    raw = hashlib.sha256(content).digest()
    return "sha256=" + base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _of_project(project: Path) -> tuple[str, dict[str, bytes]]:
    """From a source tree, as its build would."""
    told = tomllib.loads(project.read_text("utf-8"))
    version = str(told["project"]["version"])
    files = dict(_files(_PACKAGE, _NAME))
    included = told["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    for source, place in included.items():
        files.update(_files(project.parent / source, place))
    info = f"{_NAME}-{version}.dist-info"
    files[f"{info}/METADATA"] = _metadata(told["project"]).encode()
    scripts = told["project"]["scripts"].items()
    lines = ["[console_scripts]", *(f"{name} = {target}" for name, target in sorted(scripts))]
    files[f"{info}/entry_points.txt"] = ("\n".join(lines) + "\n").encode()
    files[f"{info}/licenses/LICENSE"] = (project.parent / "LICENSE").read_bytes()
    return version, files


def _metadata(project: Mapping[str, Any]) -> str:
    head = [
        "Metadata-Version: 2.1",
        f"Name: {project['name']}",
        f"Version: {project['version']}",
        f"Requires-Python: {project['requires-python']}",
    ]
    return "\n".join([*head, *(f"Requires-Dist: {need}" for need in project["dependencies"])]) + "\n"


def _of_installation() -> tuple[str, dict[str, bytes]]:
    """From where pip has put it."""
    found = metadata.distribution(_NAME)
    files = dict(_files(_PACKAGE, _NAME))
    info = f"{_NAME}-{found.version}.dist-info"
    for name in ("METADATA", "entry_points.txt", "licenses/LICENSE"):
        text = found.read_text(name)
        if text is not None:
            files[f"{info}/{name}"] = text.encode()
    if f"{info}/METADATA" not in files:
        raise ValueError("it has no metadata")
    return found.version, files


def _files(folder: Path, place: str) -> Iterator[tuple[str, bytes]]:
    """All files of a folder with their path in the wheel, but for what is compiled or hidden."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if (
            path.is_file()
            and path.suffix != ".pyc"
            and not any(p[0] == "." or p == "__pycache__" for p in parts)
        ):
            yield "/".join((place, *parts)), path.read_bytes()
