"""Validation of data rows. Knows nothing about files, tokens or models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from rlhf_critic.errors import DataError

RowModel = TypeVar("RowModel", bound=BaseModel)
# Pydantic adds the alternative of a union to an error's location: one of these, or a name with brackets.
UNION_TAGS = {"constrained-str", "str", "int"}


def validate_row(model: type[RowModel], row: Mapping[str, Any], place: str, fields: Mapping[str, str]) -> RowModel:
    """Reads from a row the fields that a model has. Other fields are ignored, and None counts as absent.

    Args:
        model: Pydantic model of the row. A field's description, if any, replaces pydantic's message about its type.
        row: Field names to values.
        place: Position of the row, as ``file:line``, for errors.
        fields: The model's field names to the names in this data, where they differ.

    Raises:
        DataError: Names the place and the invalid field, in the names of the data.
    """
    named = {name: value for name in model.model_fields if (value := row.get(fields.get(name, name))) is not None}
    try:
        return model.model_validate(named)
    except ValidationError as error:
        # The alternative of a union that was validated furthest is the one that the writer meant.
        first = max(error.errors(), key=lambda found: (len(found["loc"]), not found["type"].endswith("_type")))
        name, *inner = [str(part) for part in first["loc"] if "[" not in str(part) and part not in UNION_TAGS]
        description = None if inner else model.model_fields[name].description
        message = f"must be {description}" if description else f"{first['msg']}; fix or remove this row"
        raise DataError(f"{place}: field {'.'.join([fields.get(name, name), *inner])!r}: {message}") from error
