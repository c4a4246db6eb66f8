"""What the sections of the configuration have in common."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """A frozen group of settings; unknown keys are refused, and so are integers that no counter holds, and yes and no
    where a number belongs."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _check_truth(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[str(info.field_name)].annotation
        parts = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(part, bool) for part in parts) and kind is not bool and bool not in get_args(kind):
            raise PydanticCustomError("truth", "is yes or no, in YAML, and this key takes neither")
        return value

    @model_validator(mode="after")
    def _check_integers(self) -> Section:
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, int) and not -(2**62) <= value < 2**63:
                raise ValueError(f"{name} {value} is too large; at most 2^63 - 1")
        return self
