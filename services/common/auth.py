"""
API keys: who calls, and what that key may do.

A key is 256 random bits in text; what is kept of it is its SHA-256, which for a random key needs neither salt nor
stretching. It comes as `Authorization: Bearer KEY`, `api-key: KEY` or `x-api-key: KEY`. `tercet keys new` makes one.
"""

import hashlib
import hmac
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from services.common.errors import Forbidden, Unauthenticated
from services.common.governor import Limits
from services.common.settings import ModelServiceSettings, ServiceSettings, SettingsError
from services.common.wire.keys import KeyEntry, KeyScope

ALL: KeyScope = "admin"  # May do everything.

# What the routes of a service need unless it says otherwise.
SERVICE_SCOPE: Mapping[str, KeyScope] = {"embedding": "embed", "rerank": "rerank", "search": "search"}

# Anybody may ask whether a service is well (as TEI's probes do, too), and see the page and the documentation.
OPEN_PATHS = frozenset(
    {"/", "/livez", "/readyz", "/metrics", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"}
    | {"/tei", "/tei/", "/tei/health", "/tei/ping"}
)


def is_open(method: str, path: str) -> bool:
    """Whether a request needs no key and is not limited."""
    return path in OPEN_PATHS and method in ("GET", "HEAD")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A known key: its SHA-256 *digest*, the *scopes* it has, and what its bearer is allowed."""

    name: str
    digest: bytes
    scopes: frozenset[str]
    limits: Limits

    def may(self, scope: str) -> bool:
        """Whether the key has *scope*."""
        return scope in self.scopes or ALL in self.scopes


class KeyRing:
    """The keys that a service knows."""

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        self.keys = tuple(keys)

    def find(self, presented: bytes) -> ApiKey | None:
        """Return the key that *presented* is, if any, in a time that does not depend on which, or how much of it fits."""
        digest = hashlib.sha256(presented).digest()
        found = None
        for key in self.keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    def authenticate(self, headers: Mapping[bytes, bytes], needs: str) -> ApiKey:
        """
        Return the key that came with a request, which *needs* a scope.

        Raises:
            Unauthenticated: There is none, or it is not known.
            Forbidden: It lacks the scope.
        """
        presented = presented_key(headers)
        if presented is None:
            raise Unauthenticated(
                "An API key is needed: send Authorization: Bearer KEY, or the header api-key or x-api-key"
            )
        key = self.find(presented)
        if key is None:
            raise Unauthenticated("This API key is not known")
        if not key.may(needs):
            raise Forbidden(
                f"The API key {key.name!r} does not have the scope {needs!r}; it has {', '.join(sorted(key.scopes))}"
            )
        return key


def presented_key(headers: Mapping[bytes, bytes]) -> bytes | None:
    """Return the API key in *headers* (names in lower case); None where there is none."""
    scheme, _, credentials = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer" and credentials.strip():
        return credentials.strip()
    return headers.get(b"api-key") or headers.get(b"x-api-key") or None


_ENTRIES = TypeAdapter(Annotated[list[KeyEntry], Field(min_length=1)])


def limits_of(settings: ServiceSettings) -> Limits:
    """Return what a caller of whom nothing else is said is allowed."""
    usual = Limits(requests_per_s=settings.requests_per_s, requests_burst=settings.requests_burst)
    if isinstance(settings, ModelServiceSettings):
        usual = replace(usual, tokens_per_s=settings.tokens_per_s, tokens_burst=settings.tokens_burst)
    return usual


def open_key_ring(settings: ServiceSettings) -> KeyRing | None:
    """
    Return the keys that *settings* name; None where they name none, and callers need none.

    Raises:
        SettingsError: The file of keys cannot be read; the message names the line or the field.
    """
    usual = limits_of(settings)
    keys = []
    if settings.api_key is not None:
        digest = hashlib.sha256(settings.api_key.get_secret_value().encode()).digest()
        keys.append(ApiKey("default", digest, frozenset({ALL}), usual))
    if settings.api_keys_file is not None:
        keys += [_key(entry, usual) for entry in _read_entries(settings.api_keys_file)]
    for field in ("name", "digest"):
        values = [getattr(key, field) for key in keys]
        twice = next((key.name for key, value in zip(keys, values, strict=True) if values.count(value) > 1), None)
        if twice is not None:
            raise SettingsError(f"{settings.api_keys_file}: the {field} of the key {twice!r} is there twice")
    return KeyRing(keys) if keys else None


def _key(entry: KeyEntry, usual: Limits) -> ApiKey:
    limits = Limits(
        requests_per_s=usual.requests_per_s if entry.requests_per_s is None else entry.requests_per_s,
        requests_burst=entry.requests_burst or usual.requests_burst,
        tokens_per_s=usual.tokens_per_s if entry.tokens_per_s is None else entry.tokens_per_s,
        tokens_burst=entry.tokens_burst or usual.tokens_burst,
    )
    return ApiKey(entry.name, bytes.fromhex(entry.sha256), frozenset(entry.scopes), limits)


def _read_entries(path: Path) -> list[KeyEntry]:
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise SettingsError(f"The file of API keys {path} cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise SettingsError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{path}: not valid UTF-8") from None
    try:
        return _ENTRIES.validate_python(found)
    except ValidationError as error:
        lines = []
        for item in error.errors(include_input=False):
            entry, *field = item["loc"] or ("",)
            where = f"key {int(entry) + 1}" if isinstance(entry, int) else "the list of keys"
            lines.append(f"{path}, {where}{''.join(f', {part}' for part in field)}: {item['msg']}")
        raise SettingsError("\n".join(lines)) from None
