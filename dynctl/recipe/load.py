"""A recipe file, with overrides, as a valid and resolved value: paths absolute, keys as digests."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynctl.engines import catalog
from dynctl.engines.base import ArgValue
from dynctl.errors import RecipeError
from dynctl.hub import ASSETS, builtin_dir, snapshot
from dynctl.protocol.instances import Role
from dynctl.recipe import override
from dynctl.recipe.hosts import Host
from dynctl.recipe.model_files import ModelFiles, is_hub_id, is_path, read_facts, tokenizer_in
from dynctl.recipe.planner import Planner
from dynctl.recipe.problems import Problem, as_error, did_you_mean
from dynctl.recipe.schema import ApiKey, Recipe, RoleSection
from dynctl.recipe.shipped import find_recipe, shipped_recipes
from dynctl.recipe.source import Document, Keys, read_document
from dynctl.recipe.validate import validate, where_of

_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_ROLE_OPTION = re.compile(r"^roles\.[a-z]+\.(args|env)(?=\.|$)")
_SHORTEST_KEY = 8
_ENV = "env:"
_MISSING = {"model.path": "model directory", "engine.venv": "virtual environment"}


@dataclass(frozen=True, slots=True)
class LoadedRecipe:
    """A recipe and where each of its values was written.

    In `recipe`, paths are absolute, `model.served_name` is filled in, and `frontend.api_key` holds digests
    ("sha256:HEX"): no secret of the frontend is kept. `model` is what is at hand of the model here.
    `secrets` are the environment variables that may hold one: keys by `env:NAME`, and DYNCTL_SET.
    """

    recipe: Recipe
    file: str
    model: ModelFiles
    wheres: Mapping[Keys, str] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    secrets: frozenset[str] = frozenset()

    def where(self, dotted: str) -> str:
        """Where a field ("roles.decode.args.tp") was written: file:line, or the flag; else the file."""
        places = self._places()
        engine_wide = _ROLE_OPTION.sub(r"engine.\1", dotted)
        for exact in (dotted, engine_wide):
            if exact in places:
                return places[exact]
        while dotted and dotted not in places:
            dotted = dotted.rpartition(".")[0]
        return places.get(dotted, self.file)

    def _places(self) -> dict[str, str]:
        return {".".join(str(k) for k in keys): place for keys, place in self.wheres.items() if keys}


def load_recipe(
    path: str | Path,
    sets: Sequence[str] = (),
    unsets: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    *,
    files_here: bool = True,
) -> LoadedRecipe:
    """Read, override, validate and resolve a recipe. Judging what its fields mean is `check.check_recipe`.

    `path` may name a shipped recipe. `files_here` False: whether the files it names are there is not looked
    at, which for target local is a fault otherwise. `environ` is the process's when None: it gives
    DYNCTL_SET, the keys that `env:NAME` names, and the place of the Hugging Face cache. Raises RecipeError
    that tells all faults.
    """
    environ = os.environ if environ is None else environ
    file = find_recipe(Path(path))
    changes = override.collect(environ, sets, unsets)
    document = override.apply(_read(file), changes)
    made = validate(Recipe, document)
    if isinstance(made, list):
        raise as_error(made, str(file))
    resolver = _Resolver(file, document, environ, look=files_here)
    recipe, model = resolver.resolve(made)
    if resolver.problems:
        raise as_error(resolver.problems, str(file))
    named = (given.key.removeprefix(_ENV) for given in made.frontend.api_key if given.key.startswith(_ENV))
    secrets = frozenset((*named, override.VARIABLE))
    return LoadedRecipe(recipe, str(file), model, document.wheres, tuple(c.where for c in changes), secrets)


def _read(file: Path) -> Document:
    try:
        return read_document(file)
    except RecipeError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        names = did_you_mean(file.stem, [shipped.stem for shipped in shipped_recipes()])
        hint = f"a file, or one that comes along: {names}"
        raise RecipeError(error.message, where=error.where, hint=hint) from error


def _counted(section: RoleSection) -> RoleSection:
    """The role with one replica for each URL, unless it says how many."""
    if not section.urls or "replicas" in section.model_fields_set:
        return section
    return section.model_copy(update={"replicas": len(section.urls)})


class _Resolver:
    """Turns what a recipe refers to into absolute paths and digests; collects what is missing."""

    def __init__(self, file: Path, document: Document, environ: Mapping[str, str], *, look: bool) -> None:
        self.problems: list[Problem] = []
        self._look = look
        self._elsewhere = False
        self._folder = file.resolve().parent
        self._wheres = document.wheres
        self._environ = environ

    def resolve(self, recipe: Recipe) -> tuple[Recipe, ModelFiles]:
        """The resolved recipe and what is at hand of its model."""
        here = recipe.target == "local" and recipe.engine.container is None
        model, self._elsewhere = recipe.model, recipe.target == "ssh"
        path = self._model_path(model.path, must_exist=here)
        tokenizer = self._path(("model", "tokenizer"), model.tokenizer, must_exist=here)
        template = self._path(("model", "chat_template"), model.chat_template, must_exist=here, always=True)
        resolved = model.model_copy(
            update={
                "path": path,
                "served_name": model.name,
                "tokenizer": tokenizer,
                "chat_template": template,
            }
        )
        files = self._files(builtin_dir(path), tokenizer, template, model.revision)
        engine = recipe.engine.model_copy(update=self._engine_paths(recipe))
        frontend = recipe.frontend.model_copy(
            update={"api_key": self._digests(recipe.frontend.api_key), "tls": self._tls(recipe)}
        )
        roles = recipe.roles.model_copy(
            update={r: self._role(recipe, r, s) for r, s in recipe.roles.present().items()}
        )
        update: dict[str, Any] = {
            "model": resolved,
            "engine": engine,
            "frontend": frontend,
            "roles": roles,
            "hosts": self._hosts(recipe),
            "planner": self._planner(recipe.planner),
        }
        return recipe.model_copy(update=update), files

    def _model_path(self, value: str, *, must_exist: bool) -> str:
        keys: Keys = ("model", "path")
        if value.startswith("builtin:"):
            directory = ASSETS / value.removeprefix("builtin:")
            known = sorted(p.name for p in ASSETS.iterdir() if p.is_dir())
            if directory.name not in known or value != f"builtin:{directory.name}":
                valid = ", ".join(f"builtin:{name}" for name in known)
                self._problem(keys, f"there is no {value}", f"valid: {valid}")
            # Other machines have their own dynctl elsewhere.
            return value if self._elsewhere else str(directory)
        if not is_path(value, self._base(keys)) and not is_hub_id(value):
            self._problem(
                keys, f"'{value}' is no model", "a directory, or a Hugging Face id such as org/name"
            )
        return self._path(keys, value, must_exist=must_exist)

    def _path(self, keys: Keys, value: str, *, must_exist: bool, always: bool = False) -> str:
        """The absolute form of a path; ids and "" as they are. `always`: a path whatever its shape."""
        base = self._base(keys)
        if not value or not (always or is_path(value, base)):
            return value
        path = Path(os.path.normpath(base / Path(value).expanduser()))
        if must_exist and self._look and not path.exists():
            field = ".".join(map(str, keys))
            what = _MISSING.get(field, "file")
            self._problem(keys, f"{what} missing: {path}", f"correct {field} or --set {field}=PATH")
        return str(path)

    def _engine_paths(self, recipe: Recipe) -> dict[str, Any]:
        engine = recipe.engine
        local = recipe.target == "local"
        found: dict[str, Any] = {}
        if engine.venv is not None:
            found["venv"] = self._path(("engine", "venv"), engine.venv, must_exist=local, always=True)
        if engine.python is not None:
            by_path = "/" in engine.python
            keys: Keys = ("engine", "python")
            found["python"] = self._path(keys, engine.python, must_exist=local and by_path, always=by_path)
        found["args"] = self._args(recipe, ("engine", "args"), engine.args)
        return found

    def _role(self, recipe: Recipe, role: Role, section: RoleSection) -> RoleSection:
        args = self._args(recipe, ("roles", role, "args"), section.args)
        return _counted(section).model_copy(update={"args": args})

    def _args(self, recipe: Recipe, at: Keys, args: Mapping[str, ArgValue]) -> dict[str, ArgValue]:
        """The arguments with whole paths of the files that the engine reads."""
        files = catalog.get(recipe.backend).file_arguments
        return {
            name: self._path((*at, name), value, must_exist=False, always=True)
            if name in files and isinstance(value, str)
            else value
            for name, value in args.items()
        }

    def _hosts(self, recipe: Recipe) -> list[Host]:
        """Each host with the whole path of its key, which is looked at when it is used."""
        return [
            host.model_copy(
                update={"key": self._path(("hosts", i, "key"), host.key, must_exist=False, always=True)}
            )
            for i, host in enumerate(recipe.hosts)
        ]

    def _planner(self, planner: Planner | None) -> Planner | None:
        """The section with whole paths of its profiles, which are read when they are used."""
        if planner is None:
            return None
        whole = self._path(("planner", "profile"), planner.profile, must_exist=False, always=True)
        roles = {
            role: section.model_copy(
                update={
                    "profile": self._path(
                        ("planner", "roles", role, "profile"), section.profile, must_exist=False, always=True
                    )
                }
            )
            for role, section in planner.roles
        }
        return planner.model_copy(
            update={"profile": whole, "roles": planner.roles.model_copy(update=dict(roles))}
        )

    def _tls(self, recipe: Recipe) -> object:
        tls = recipe.frontend.tls
        if tls is None:
            return None
        local = recipe.target == "local"
        at: Keys = ("frontend", "tls")
        return tls.model_copy(
            update={
                "cert": self._path((*at, "cert"), tls.cert, must_exist=local, always=True),
                "key": self._path((*at, "key"), tls.key, must_exist=local, always=True),
            }
        )

    def _files(self, path: str, tokenizer: str, template: str, revision: str) -> ModelFiles:
        directory = path if os.path.isabs(path) else snapshot(path, revision, self._environ)
        own = tokenizer or path
        at_hand = own if os.path.isabs(own) else snapshot(own, revision, self._environ)
        try:
            facts = read_facts(directory)
        except ValueError as error:
            self._problem(("model", "path"), f"{directory}: {error}", "")
            facts = None
        return ModelFiles(directory, tokenizer_in(at_hand), template, facts)

    def _digests(self, keys: Sequence[ApiKey]) -> list[ApiKey]:
        """The keys by digest instead of as they are; those that are a problem are left out."""
        digests = []
        for i, given in enumerate(keys):
            at: Keys = ("frontend", "api_key", i)
            if _DIGEST.fullmatch(given.key):
                digests.append(given)
                continue
            if given.key.startswith("sha256:"):
                self._problem(at, "no SHA-256 digest follows 'sha256:'", "64 digits of 0-9 and a-f")
                continue
            key = self._secret(at, given.key)
            if key is None:
                continue
            if len(key) < _SHORTEST_KEY:
                self._problem(at, "an API key is too short", f"at least {_SHORTEST_KEY} characters")
            digest = "sha256:" + hashlib.sha256(key.encode()).hexdigest()
            digests.append(given.model_copy(update={"key": digest}))
        return digests

    def _secret(self, at: Keys, text: str) -> str | None:
        """The key that `env:NAME`, `file:PATH` or the text itself gives; None when it is a problem."""
        if text.startswith(_ENV):
            name = text.removeprefix(_ENV)
            value = self._environ.get(name)
            if not value:
                hint = f"export {name} first" if name else "env:NAME names one"
                self._problem(at, f"the environment variable {name} is not set", hint)
            return value or None
        if not text.startswith("file:"):
            return text
        path = self._base(at) / Path(text.removeprefix("file:")).expanduser()
        try:
            return path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            self._problem(at, f"the key file {path} cannot be read: {error}", "")
            return None

    def _base(self, keys: Keys) -> Path:
        """The folder of relative paths: the recipe's, or this one for a value by flag or environment."""
        where = where_of(self._wheres, keys)
        return Path.cwd() if where.startswith(("--", override.VARIABLE)) else self._folder

    def _problem(self, keys: Keys, message: str, hint: str) -> None:
        self.problems.append(Problem(where_of(self._wheres, keys), message, hint))
