"""An API key as the file of keys has it; `tercet keys new` writes one, every service reads them."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

KeyScope = Literal["search", "embed", "rerank", "write", "admin"]

_Rate = Annotated[float, Field(ge=0)]
_Burst = Annotated[int, Field(ge=1)]


class KeyEntry(BaseModel):
    """
    One key: whose it is, the SHA-256 of its text in hexadecimal, and what it may do.

    `embed` and `rerank` are for those services; `search` asks and reads, `write` writes and deletes documents and creates
    collections, `admin` may do everything, such as delete collections. Rates that are left out are the service's own.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}$")]
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    scopes: Annotated[list[KeyScope], Field(min_length=1)]
    requests_per_s: _Rate | None = None
    requests_burst: _Burst | None = None
    tokens_per_s: _Rate | None = None
    tokens_burst: _Burst | None = None
