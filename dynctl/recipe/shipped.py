"""The recipes and sbatch scripts that come along: beside the package in a checkout, inside it in a wheel."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent


def directory(kind: str = "recipes") -> Path | None:
    """Where the shipped "recipes" or "slurm" scripts are, None in a broken installation."""
    for place in (_PACKAGE / "_data" / kind, _PACKAGE.parent / kind):
        if place.is_dir():
            return place
    return None


def shipped_recipes() -> list[Path]:
    """All shipped recipes, by name."""
    place = directory()
    return sorted(place.glob("*.yaml")) if place else []


def shipped_scripts() -> list[Path]:
    """All shipped sbatch scripts, by name."""
    place = directory("slurm")
    return sorted(place.glob("*.sbatch")) if place else []


def find_recipe(path: Path) -> Path:
    """The file meant: as given when it exists, else the shipped one of that name, else as given.

    "quickstart", "quickstart.yaml" and "recipes/quickstart.yaml" all name the shipped quickstart.
    """
    if path.exists() or path.is_absolute() or str(path.parent) not in (".", "recipes"):
        return path
    wanted = path.name if path.suffix else f"{path.name}.yaml"
    return next((shipped for shipped in shipped_recipes() if shipped.name == wanted), path)
