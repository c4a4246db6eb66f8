"""What the sections of the configuration have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """A frozen group of settings; unknown keys are refused, and so are integers that no counter holds."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _check_integers(self) -> Section:
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, int) and not -(2**62) <= value < 2**63:
                raise ValueError(f"{name} {value} is too large; at most 2^63 - 1")
        return self
