"""Reads the README's two opening commands, so that CI runs exactly what users are told to run."""

from __future__ import annotations

import pathlib
import re
import sys
import urllib.error
import urllib.request
import zipfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
URL = "http://127.0.0.1:8000/health"


def commands() -> tuple[str, str]:
    """The first two shell blocks of the README."""
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    if len(blocks) < 2:
        raise SystemExit("README.md must open with two shell blocks")
    return blocks[0].strip(), blocks[1].strip()


def healthy() -> bool:
    try:
        with urllib.request.urlopen(URL, timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def check_wheel(path: str) -> None:
    """Every shipped recipe, sbatch script and dashboard is in the wheel, and the compiled hot path."""
    names = set(zipfile.ZipFile(path).namelist())
    want = {f"dynctl/_data/{p.relative_to(ROOT)}" for p in ROOT.glob("recipes/*.yaml")}
    want |= {f"dynctl/_data/{p.relative_to(ROOT)}" for p in ROOT.glob("slurm/*.sbatch")}
    want |= {f"dynctl/_data/{p.relative_to(ROOT)}" for p in ROOT.glob("dashboards/*.json")}
    want.add("dynctl/native/_compiled.abi3.so")
    if not want or want - names:
        raise SystemExit(f"missing from {path}: {sorted(want - names)}")
    sys.stdout.write(f"{path}: {len(want)} recipes, scripts, dashboards and modules\n")


def main(what: str, *rest: str) -> None:
    first, second = commands()
    if what == "first":
        sys.stdout.write(first)
    elif what == "second-install":
        sys.stdout.write(second.rpartition("&&")[0].strip())
    elif what == "second-tests":
        sys.stdout.write(second.rpartition("&&")[2].strip())
    elif what == "healthy":
        raise SystemExit(0 if healthy() else 1)
    elif what == "wheel":
        check_wheel(*rest)
    else:
        raise SystemExit(f"unknown part {what!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
