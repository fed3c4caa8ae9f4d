"""AIConfigurator's times as JSON lines, run by the Python that has it, which needs no dynctl there.

`python -I aiconfigurator_child.py`. The first line on standard input asks for a model on a GPU with an engine
(`_open` has its fields), each further line for a layout of it (`_sample`); each is answered with one line.
What cannot be is answered {"refused": why, "hint": what would be right}; without the package:
{"absent": true}. Standard output is for answers alone: what the package prints goes to standard error. It
may not use the network.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib import metadata
from typing import IO, Any

Ask = Callable[..., Any]
_CANNOT = (ValueError, RuntimeError, LookupError, AssertionError)
"""As which AIConfigurator tells that it has no figures."""


class Refused(Exception):
    """An answer in words: why not, and what would be right."""


def no_network(event: str, _: object) -> None:
    """An audit hook that lets nothing reach another host."""
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        raise RuntimeError("AIConfigurator asked for the network")


def bare(model: str) -> str:
    """A model's name without owner and tuning: meta-llama/Meta-Llama-3.1-70B-Instruct → llama-3.1-70b."""
    return model.rsplit("/", 1)[-1].lower().removeprefix("meta-").removesuffix("-instruct")


def bundled(model: str, known: set[str]) -> str:
    """The id under which the package has a model's config. Raises Refused: it would be downloaded."""
    if model in known:
        return model
    owner = model.split("/", 1)[0]
    same = sorted((name for name in known if bare(name) == bare(model)), key=lambda n: (owner not in n, n))
    if not same:
        raise Refused(f"has no config of {model}", "a directory with the model's config.json")
    return same[0]


def _system(gpu: str, backend: str, databases: Mapping[str, Mapping[str, Any]]) -> str:
    """The name of a GPU there. Raises Refused when it or the engine on it was not measured."""
    have = {name: engines for name, engines in databases.items() if engines}
    system = next((name for name in (gpu, f"{gpu}_sxm") if name in have), "")
    if not system:
        raise Refused(f"has no figures of GPU {gpu}", f"it has {', '.join(sorted(have))}")
    if backend not in have[system]:
        raise Refused(f"has no figures of {backend} on {system}", f"it has {', '.join(sorted(have[system]))}")
    return system


def _open(question: Mapping[str, Any]) -> tuple[dict[str, Any], Ask, Ask]:
    """What will be answered for; how a pass is asked for, and the room for KV.

    `model`: id or directory; `gpu`: "h200"; `backend`; `gemm`, `moe`: formats of weights, null = as
    published; `memory_share`, `sequences`, `batched_tokens`: of one rank.
    """
    from aiconfigurator.cli.api import cli_estimate
    from aiconfigurator_core.sdk.common import DefaultHFModels
    from aiconfigurator_core.sdk.memory import estimate_kv_cache
    from aiconfigurator_core.sdk.perf_database import get_latest_database_version, get_supported_databases
    from aiconfigurator_core.sdk.utils import get_model_config_from_model_path

    model, backend = question["model"], question["backend"]
    if not os.path.isdir(model):
        model = bundled(model, set(DefaultHFModels))
    system = _system(question["gpu"], backend, get_supported_databases())
    database = get_latest_database_version(system=system, backend=backend)
    config = get_model_config_from_model_path(model)["raw_config"]
    modes = {
        "gemm_quant_mode": question["gemm"],
        "moe_quant_mode": question["moe"],
        "kvcache_quant_mode": "bfloat16",
    }
    a_pass = partial(
        cli_estimate, model, system, backend_name=backend, backend_version=database, osl=2, **modes
    )
    room = partial(
        _room,
        partial(
            estimate_kv_cache,
            model,
            system,
            backend,
            database,
            max_num_tokens=question["batched_tokens"],
            max_batch_size=question["sequences"],
            memory_fraction_value=question["memory_share"],
            **modes,
        ),
    )
    return {"database": database, "model": model, "config": config}, a_pass, room


def _room(estimate: Ask, **sizes: int | None) -> int:
    """Tokens of KV on one rank. Some engines are told a share of all memory, others of what is free."""
    try:
        found = estimate(memory_fraction_kind="of_total", **sizes)
    except ValueError as error:
        if "incompatible memory fraction" not in str(error):
            raise
        found = estimate(memory_fraction_kind="of_free", **sizes)
    return int(found["total_kv_size_tokens"])


def _sample(a_pass: Ask, room: Ask, question: Mapping[str, Any]) -> dict[str, Any]:
    """Times of one layout, in ms: reading a prompt of each length alone, one step at each batch of a rank and
    context.

    `sizes`: the layout in the package's words; `prompts`, `batches`, `contexts`: tokens, sequences, tokens.
    """
    sizes = question["sizes"]
    kv_tokens = room(**sizes)
    read = partial(a_pass, mode="static_ctx", batch_size=1, **sizes)
    step = partial(a_pass, mode="static_gen", **sizes)
    first = read(isl=question["prompts"][0])
    return {
        "kv_tokens": kv_tokens,
        "gemm": first.raw["gemm"],
        "prefill_ms": [first.ttft, *(read(isl=tokens).ttft for tokens in question["prompts"][1:])],
        "decode_ms": [
            [step(isl=context, batch_size=batch).tpot for context in question["contexts"]]
            for batch in question["batches"]
        ],
    }


def _refusal(error: Exception) -> dict[str, Any]:
    """Why not, in one line."""
    if isinstance(error, Refused):
        return {"refused": error.args[0], "hint": error.args[1]}
    words = " ".join(str(error).split()) or type(error).__name__
    words = re.sub(r"/\S*/systems/data/", "", words)
    return {"refused": words.removeprefix("perf database error: ")[:400]}


def main(questions: IO[str], answers: IO[str]) -> int:
    """Answer until there are no more questions; 1 when the first one cannot be."""

    def answer(value: Mapping[str, Any]) -> None:
        answers.write(json.dumps(value, allow_nan=False) + "\n")
        answers.flush()

    try:
        version = metadata.version("aiconfigurator")
    except metadata.PackageNotFoundError:
        answer({"absent": True})
        return 1
    sys.addaudithook(no_network)
    try:
        told, a_pass, room = _open(json.loads(questions.readline()))
    except (*_CANNOT, Refused) as error:
        answer({"version": version, **_refusal(error)})
        return 1
    answer({"version": version, **told})
    while line := questions.readline():
        try:
            answer(_sample(a_pass, room, json.loads(line)))
        except _CANNOT as error:
            answer(_refusal(error))
    return 0


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as stdout:
        os.dup2(2, 1)
        sys.exit(main(sys.stdin, stdout))
