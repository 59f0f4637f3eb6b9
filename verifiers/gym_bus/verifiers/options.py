"""Options of verifiers, checked once when a verifier is made."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from gym_bus.errors import UsageError, did_you_mean

T = TypeVar("T", bound=msgspec.Struct)


def read_options(type_: type[T], verifier: str, options: dict[str, Any]) -> T:
    """`options` as the struct `type_`. Raises UsageError naming the verifier and the option."""
    for key in options:
        if key not in type_.__struct_fields__:
            raise UsageError(
                f"verifier {verifier!r}: unknown option {key!r}: {did_you_mean(key, type_.__struct_fields__)}"
            )
    try:
        return msgspec.convert(options, type_)
    except msgspec.ValidationError as e:
        raise UsageError(f"verifier {verifier!r}: {e}") from None
