"""Compile the steps of the hot path: done when dynctl is installed, and by hand after a change of them.

python -m dynctl.native.build
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from dynctl.native.load import FAILED, FOLDER, MODULE, digest, sources

FLAGS: Final = ("-std=c11", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-D_GNU_SOURCE")
DEADLINE_S: Final = 120.0


def build(folder: Path, made: Path, extra: Sequence[str] = ()) -> str:
    """Compile the sources in `folder` to the extension module `made`, which is there whole or not at all.
    Returns why it is not, "" for a success. The compiler is `CC`, else `cc`.
    """
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    if shutil.which(compiler[0]) is None:
        return f"there was no C compiler ({compiler[0]}) when dynctl was installed"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        return f"Python's C headers were missing when dynctl was installed ({header})"
    draft = made.with_name(f".{made.name}.{os.getpid()}")
    found = sources(folder)
    defined = f'-DDYNCTL_SOURCE="{digest(found)}"'
    units = [str(source) for source in found if source.suffix == ".c"]
    argv = [*compiler, *FLAGS, *extra, defined, f"-I{header.parent}", *units, "-o", str(draft)]
    try:
        done = subprocess.run(argv, capture_output=True, timeout=DEADLINE_S, text=True, check=False)
        if done.returncode == 0:
            draft.replace(made)
            return ""
        said = [line for line in done.stderr.splitlines() if "error" in line]
        why = said[0].strip() if said else f"exit code {done.returncode}"
    except (OSError, subprocess.TimeoutExpired) as error:
        why = str(error)
    finally:
        draft.unlink(missing_ok=True)
    return f"the C compiler failed when dynctl was installed: {why}"


def build_into(folder: Path) -> str:
    """Leave the module, or why there is none, in `folder`, in place of what was there. Returns as `build`."""
    module, failed = folder / MODULE, folder / FAILED
    failure = build(FOLDER, module)
    if failure:
        module.unlink(missing_ok=True)
        failed.write_text(failure + "\n", "utf-8")
    else:
        failed.unlink(missing_ok=True)
    return failure


if __name__ == "__main__":
    sys.exit(build_into(FOLDER) or None)
