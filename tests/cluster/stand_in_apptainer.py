"""Stands in for `apptainer` on nodes that have none: holds its caller to the contract, then runs the command.

`apptainer exec [--nv] [--bind SRC:DST[:ro]]... IMAGE COMMAND...`: options in front of the image, each source
and the image there, and the environment handed on. "In the image" are `vllm` and `trtllm-serve`, a simulated
engine behind their command lines. What it was called with is left beside the image.
"""

from __future__ import annotations

import json
import os
import sys
from itertools import pairwise


def main() -> None:
    """Become the command, or end with 255 and a word, as apptainer does."""
    words = sys.argv[1:]
    if words[:1] != ["exec"]:
        fatal(f"unknown command {words[:1]}")
    words, binds = words[1:], []
    while words and words[0].startswith("-"):
        flag = words.pop(0)
        if flag == "--bind":
            binds.append(words.pop(0))
        elif flag != "--nv":
            fatal(f"unknown flag: {flag}")
    for bind in binds:
        source, target, *mode = bind.split(":")
        if not os.path.exists(source) or not target.startswith("/") or mode not in ([], ["ro"], ["rw"]):
            fatal(f"mount {bind} is not possible")
    if len(words) < 2 or not os.path.isfile(words[0]):
        fatal(f"could not open image {words[:1]}")
    image, command, *rest = words
    told = {"argv": sys.argv[1:], "gpus": os.environ.get("CUDA_VISIBLE_DEVICES")}
    with open(f"{image}.{os.getpid()}", "w") as note:
        json.dump(told | {"slurm": sorted(k for k in os.environ if k.startswith("SLURM_STEP"))}, note)
    given = (
        rest[1:] if [command, *rest[:1]] == ["vllm", "serve"] else rest if command == "trtllm-serve" else []
    )
    if not given:
        fatal(f"exec: {command}: executable file not found in $PATH")
    os.execv(sys.executable, [sys.executable, "-m", "dynctl.mocker", *simulated(given[0], given[1:])])


def simulated(model: str, given: list[str]) -> list[str]:
    """The arguments of the simulated engine for those of the real one."""
    pairs = dict(pairwise(given))
    kept = ("--host", "--port", "--served-model-name")
    return ["--model", model, *(word for flag in kept if flag in pairs for word in (flag, pairs[flag]))]


def fatal(why: str) -> None:
    """As apptainer ends."""
    sys.stderr.write(f"FATAL:   {why}\n")
    sys.exit(255)


if __name__ == "__main__":
    main()
