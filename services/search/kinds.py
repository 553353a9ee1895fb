"""The kinds of metadata fields: what a field of each kind may hold, and how a date is read."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal

from services.common.errors import InvalidInput
from services.search.ports import AttributeKind, MetadataValue

Kinds = Mapping[str, AttributeKind] | None

_EXPECTED: dict[AttributeKind, str] = {
    "keyword": "a string or a list of strings",
    "number": "a number",
    "bool": "true or false",
    "date": "an ISO 8601 date such as 2026-05-31 or 2026-05-31T12:00:00Z, or a number of seconds since 1970",
}


def kind_of(field: str, kinds: Kinds, path: str) -> AttributeKind:
    """Return the kind that *field* is indexed as. Raises InvalidInput, naming *path*, where it is not indexed."""
    if kinds is None:
        return "any"
    kind = kinds.get(field)
    if kind is None:
        there_are = f"filters may name {', '.join(sorted(kinds))}" if kinds else "it has no indexed fields"
        raise InvalidInput(
            f"The field {field!r} is not indexed in this collection: {there_are}; "
            "reindex into a collection that has it among its attributes.",
            param=path,
        )
    return kind


def fits(value: Any, kind: AttributeKind) -> bool:
    """Whether a field of *kind* may hold *value*."""
    match kind:
        case "keyword":
            return isinstance(value, (str, list))
        case "number":
            return isinstance(value, (int, float)) and not isinstance(value, bool)
        case "bool":
            return isinstance(value, bool)
        case "date":
            return microseconds(value) is not None
    return True


def misfit(field: str, kind: AttributeKind, path: str) -> InvalidInput:
    """Return the error of a value that does not fit."""
    return InvalidInput(f"{path}: {field!r} is indexed as {kind}, which takes {_EXPECTED[kind]}.", param=path)


def check_metadata(metadata: Mapping[str, MetadataValue], kinds: Kinds, path: str = "metadata") -> None:
    """Do nothing if every indexed field fits its kind. Raises InvalidInput, naming the field below *path*, otherwise."""
    for field, kind in (kinds or {}).items():
        if field in metadata and not fits(metadata[field], kind):
            raise misfit(field, kind, f"{path}.{field}")


def microseconds(value: Any) -> int | None:
    """
    Return a date as microseconds since 1970 in UTC; None for what is no date.

    A string is read as ISO 8601 (without an offset: UTC; without a time: midnight), a number as seconds since 1970.
    """
    moment = _moment(value)
    if moment is None:
        return None
    since = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def canonical_date(value: Any) -> str | None:
    """Return a date as ISO 8601 in UTC with microseconds, so that equal moments are equal strings; None for no date."""
    moment = _moment(value)
    return None if moment is None else moment.isoformat(timespec="microseconds")


def _moment(value: Any) -> datetime | None:
    try:
        if isinstance(value, str):
            moment = datetime.fromisoformat(value.strip())
            return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return datetime.fromtimestamp(value, UTC)
    except (ValueError, OverflowError, OSError):
        pass
    return None


Comparison = Literal["$gt", "$gte", "$lt", "$lte"]
