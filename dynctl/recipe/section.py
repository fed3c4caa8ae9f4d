"""What all parts of a recipe or inventory file have in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    """Base of all parts: unknown keys are errors, nothing is coerced, nothing changes after loading."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def _env_value(value: object) -> object:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str):
        return value
    raise ValueError('must be a string; quote it ("1", "true")')


Count = Annotated[int, Field(ge=1)]
Env = dict[str, Annotated[str, BeforeValidator(_env_value)]]
