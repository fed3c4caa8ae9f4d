"""Whom a measuring verb asks: a running deployment by name, or any server by its URL."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from dynctl.cli.pick import pick, state, view
from dynctl.deploy.home import RunDir
from dynctl.errors import DynctlError, NotReady, UsageError
from dynctl.hub import builtin_dir, snapshot
from dynctl.profiler.load.client import Asker
from dynctl.profiler.load.spec import Endpoint
from dynctl.recipe.load import load_recipe

_SHOWN = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """An endpoint, what people call it, and what it takes: `gpus`, or where there are none `workers`."""

    label: str
    endpoint: Endpoint
    gpus: int = 0
    workers: int = 0

    @property
    def units(self) -> tuple[int, str]:
        """How many of what it costs; 0 = not known."""
        return (self.gpus, "GPU") if self.gpus else (self.workers, "worker")


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """How to ask: `model` "" = what is served there, `tokenizer` None = the deployment's own."""

    model: str = ""
    api_key: str = ""
    tokenizer: str | None = None
    insecure: bool = False


def is_url(text: str | None) -> bool:
    """Whether it is a server's URL and no deployment's name."""
    return text is not None and "://" in text


def find_target(where: str | None, access: Access) -> Target:
    """The one of that URL or name, or the only deployment that runs. Its model is one that it serves.

    Raises UsageError, NotReady, RequestError, TransportError, Elsewhere.
    """
    if is_url(where):
        assert where is not None
        return _served(where, Endpoint(url=where, model=access.model, verify=not access.insecure), access)
    run = pick(where)
    kept = state(run)
    if not kept.url:
        raise NotReady(f"'{kept.name}' has no frontend yet", where=str(run.path), hint="dynctl wait")
    seats = [row for row in view(run).processes if row.role != "frontend" and not row.surge]
    # Its certificate is the user's own.
    endpoint = Endpoint(
        url=kept.url, model=access.model or kept.model, tokenizer=_tokenizer_of(run), verify=False
    )
    target = _served(kept.name, endpoint, access)
    return Target(
        label=target.label,
        endpoint=target.endpoint,
        gpus=sum(len(row.gpus) for row in seats),
        workers=len(seats),
    )


def tokenizer_path(named: str) -> str:
    """Where a tokenizer is on this machine: a file, a directory, a model with dynctl or in the Hugging Face
    cache; "" = nowhere.
    """
    path = builtin_dir(named)
    if path and not os.path.exists(path):
        path = snapshot(named, "", os.environ)
    file = Path(path, "tokenizer.json") if path and os.path.isdir(path) else Path(path or "/")
    return path if file.is_file() else ""


def _tokenizer_of(run: RunDir) -> str:
    """The deployment's tokenizer, when it is on this machine."""
    try:
        model = load_recipe(run.lock).recipe.model
    except DynctlError:
        return ""  # its files may be on other machines: prompts are then made of common words
    return tokenizer_path(model.tokenizer or model.path)


def _served(label: str, endpoint: Endpoint, access: Access) -> Target:
    """With a model that is served there, and the key and tokenizer of the user."""
    tokenizer = endpoint.tokenizer
    if access.tokenizer is not None:
        tokenizer = tokenizer_path(access.tokenizer)
        if not tokenizer:
            raise UsageError(
                f"no tokenizer.json for '{access.tokenizer}' on this machine", hint="a directory or file"
            )
    known = replace(endpoint, api_key=access.api_key, tokenizer=tokenizer)
    served = asyncio.run(_models(known))
    model = endpoint.model or (served[0] if len(served) == 1 else "")
    listed = ", ".join(served[:_SHOWN]) + (" …" if len(served) > _SHOWN else "")
    if not model:
        hint = f"--model one of {listed}" if served else "--model NAME"
        raise UsageError("which model is to be asked?", where=endpoint.url, hint=hint)
    if served and model not in served:
        raise UsageError(f"no model '{model}' is served", where=endpoint.url, hint=f"there are: {listed}")
    return Target(label=label, endpoint=replace(known, model=model))


async def _models(endpoint: Endpoint) -> list[str]:
    asker = Asker(endpoint)
    try:
        return await asker.models()
    finally:
        await asker.close()
