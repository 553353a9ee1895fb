"""
How settings are read: one frozen class per service, built once in its `__main__`, never at import.

pydantic-settings ignores environment variables that no field is named after, so a typing error would be silent:
`read_settings` refuses them and suggests the setting that was meant.
"""

import difflib
import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

S = TypeVar("S", bound="ServiceSettings")


class SettingsError(Exception):
    """The environment is wrong; the message names each variable and what it should be."""


class ServiceSettings(BaseSettings):
    """What every service can be told. A service's class adds its own and sets `env_prefix`."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", env_ignore_empty=True)

    listen_host: str = Field(default="127.0.0.1", description="Address to listen on.")
    listen_port: Annotated[int, Field(ge=0, le=65535)] = Field(
        default=8000, description="Port to listen on; 0 picks one."
    )
    allow_open_network: bool = Field(
        default=False,
        description="Allow listening beyond this machine without API keys: anybody who reaches the port may use it.",
    )
    api_key: SecretStr | None = Field(default=None, description="One API key, as plain text, that may do everything.")
    api_keys_file: Path | None = Field(
        default=None,
        description="JSON list of API keys as `tercet keys new` prints them: `name`, `sha256`, `scopes` of `search`, "
        "`embed`, `rerank`, `write` and `admin`, and rates of their own. Read at start.",
    )
    requests_per_s: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="Requests that each API key (without keys: each address) may send; 0 is no limit."
    )
    requests_burst: Annotated[int, Field(ge=1)] = Field(
        default=50, description="… and how many at once before that rate holds."
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), description="Origins whose pages may call this service from a browser, with commas; `*` is all."
    )
    trusted_proxies: str = Field(
        default="",
        description="Addresses, with commas, of proxies whose X-Forwarded-For and -Proto are believed; `*` is all.",
    )
    access_log: Literal["all", "slow", "errors"] = Field(
        default="slow",
        description="Which requests are logged: `errors` those with a 5xx answer; `slow` also those that took longer "
        "than the next setting; `all`.",
    )
    slow_request_s: Annotated[float, Field(gt=0)] = Field(default=1.0, description="A request over this is slow.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severe level logged."
    )
    log_format: Literal["auto", "json", "console"] = Field(
        default="auto", description="`auto`: console on a terminal, JSON elsewhere."
    )
    max_body_bytes: Annotated[int, Field(ge=1024)] = Field(
        default=32 * 1024 * 1024, description="Larger request bodies are refused with 413."
    )
    max_timeout_s: Annotated[float, Field(gt=0)] = Field(
        default=600.0, description="Cap on the time a caller may ask for with X-Deadline-Ms."
    )
    shutdown_grace_s: Annotated[float, Field(ge=0)] = Field(
        default=10.0, description="After SIGTERM, requests under way have this long to finish."
    )
    port_file: Path | None = Field(
        default=None, description="Write the port listened on into this file once it is bound."
    )
    otlp_endpoint: Annotated[str, Field(pattern=r"^https?://[^/]+")] | None = Field(
        default=None,
        description="Send traces to the OpenTelemetry collector at this address (OTLP over HTTP, such as "
        "http://localhost:4318); unset, nothing is traced. Needs `pip install 'tercet[otel]'`.",
    )
    otlp_service_name: str | None = Field(
        default=None, description="The service's name in traces; `tercet-` and the service when unset."
    )
    trace_sample_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        default=1.0,
        description="Share of the requests that is traced; one whose caller sent `traceparent` is traced if the "
        "caller's own is.",
    )

    redis_url: str | None = Field(
        default=None,
        validation_alias="REDIS_URL",
        description="A Redis that processes share: caches and rate limits; each process has its own when unset.",
    )
    breaker_window_s: Annotated[float, Field(gt=0)] = Field(
        default=10.0, description="Breakers look at the calls of this last time."
    )
    breaker_failure_ratio: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.5, description="A breaker opens when this share of them failed."
    )
    breaker_min_calls: Annotated[int, Field(ge=1)] = Field(default=3, description="… of at least this many.")
    breaker_reset_s: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="An open breaker lets a probe through after this time."
    )
    breaker_slow_call_s: Annotated[float, Field(gt=0)] = Field(
        default=1.0,
        description="A call that a search waits for counts as failed when it takes longer than this, not counting "
        "work that was asked for.",
    )

    @model_validator(mode="after")
    def _open_network_is_said(self) -> Self:
        has_keys = self.api_key is not None or self.api_keys_file is not None
        if not (has_keys or self.allow_open_network or _is_loopback(self.listen_host)):
            prefix = self.model_config.get("env_prefix", "")
            raise ValueError(
                f"{prefix}LISTEN_HOST={self.listen_host} can be reached from other machines, without authentication; "
                f"set {prefix}API_KEY or {prefix}API_KEYS_FILE, or {prefix}ALLOW_OPEN_NETWORK=true if that is meant"
            )
        return self

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


class ModelServiceSettings(ServiceSettings):
    """What both services that run a model can be told."""

    model_revision: str | None = Field(default=None, description="Branch, tag or commit of a hub model.")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(default="auto", description="Where the model runs.")
    runtime: Literal["auto", "torch", "openvino"] = Field(
        default="auto",
        description="What computes the model; `auto`: on a CPU the faster one, measured at the first start and kept.",
    )
    inference_threads: Annotated[int, Field(ge=0, le=1024)] = Field(
        default=0, description="Threads that compute; 0: all cores that the process may use."
    )
    model_cache_dir: Path | None = Field(
        default=None,
        description="Where converted models and measured choices are kept; `~/.cache/tercet` when unset.",
    )
    tokens_per_s: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="Model tokens that each key or address may use, counted afterwards; 0 is no limit."
    )
    tokens_burst: Annotated[int, Field(ge=1)] = Field(
        default=100_000, description="… and how many at once before that rate holds."
    )
    tokenizer_threads: Annotated[int, Field(ge=1, le=64)] = Field(default=1, description="Threads that tokenise.")
    hang_s: Annotated[float, Field(gt=0)] = Field(
        default=30.0, description="A batch that runs longer means the worker hangs: waiters fail and /livez turns red."
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def variable_names(settings_class: type[ServiceSettings]) -> dict[str, str]:
    """Return each setting's environment variable and the field it fills."""
    prefix = settings_class.model_config.get("env_prefix", "")
    return {
        (str(field.validation_alias) if field.validation_alias else f"{prefix}{name}").upper(): name
        for name, field in settings_class.model_fields.items()
    }


def read_settings(settings_class: type[S], environ: Mapping[str, str]) -> S:
    """
    Build *settings_class* from the process's environment, which *environ* must be a view of.

    Raises:
        SettingsError: A variable has a bad value, or bears our prefix and names no setting.
    """
    known = variable_names(settings_class)
    prefix = settings_class.model_config.get("env_prefix", "").upper()
    problems = []
    for variable in sorted(environ):
        if variable.upper().startswith(prefix) and variable.upper() not in known:
            close = difflib.get_close_matches(variable.upper(), known, n=1, cutoff=0.5)
            problems.append(f"{variable}: there is no such setting" + (f"; did you mean {close[0]}?" if close else ""))
    if problems:
        raise SettingsError("\n".join(problems))
    try:
        return settings_class()
    except ValidationError as error:
        by_field = {field: variable for variable, field in known.items()}
        lines = []
        for item in error.errors():
            field = str(item["loc"][0]) if item["loc"] else ""
            where = by_field.get(field, field)
            lines.append(f"{where}: {item['msg']}" if where else item["msg"].removeprefix("Value error, "))
        raise SettingsError("\n".join(lines)) from None


def settings_table(settings_class: type[ServiceSettings]) -> str:
    """Return the settings as a Markdown table, for docs/settings.md: variable, default, meaning."""
    rows = ["| variable | default | meaning |", "|---|---|---|"]
    for variable, name in variable_names(settings_class).items():
        field = settings_class.model_fields[name]
        default = "" if field.default in (None, "", ()) else f"`{field.default}`"
        rows.append(f"| `{variable}` | {default} | {field.description} |")
    return "\n".join(rows)
