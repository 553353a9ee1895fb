"""Settings are read once from the environment; what is wrong with it is said by the variable's name."""

import os

import pytest
from pydantic import ValidationError

from services.common.settings import ServiceSettings, SettingsError, read_settings, settings_table, variable_names
from services.embedding.settings import EmbeddingSettings
from services.rerank.settings import RerankSettings
from services.search.settings import SearchSettings

SERVICES = [EmbeddingSettings, RerankSettings, SearchSettings]
PREFIX = {EmbeddingSettings: "EMBEDDING_", RerankSettings: "RERANK_", SearchSettings: "SEARCH_"}

every_service = pytest.mark.parametrize("service", SERVICES, ids=lambda cls: cls.__name__)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of ours comes from outside."""
    for variable in list(os.environ):
        if variable.upper().startswith((*PREFIX.values(), "REDIS_URL")):
            monkeypatch.delenv(variable)


@every_service
def test_nothing_needs_to_be_set(service):
    """Every service starts with an empty environment, on this machine only."""
    settings = read_settings(service, os.environ)
    assert settings.listen_host == "127.0.0.1"
    assert not settings.allow_open_network


def test_each_service_has_a_port_of_its_own():
    """The three services run beside each other with their defaults."""
    assert [read_settings(service, os.environ).listen_port for service in SERVICES] == [8001, 8002, 8000]


@every_service
def test_a_variable_sets_its_field(service, monkeypatch):
    """A variable is the prefix and the setting's name, in capitals."""
    monkeypatch.setenv(f"{PREFIX[service]}LISTEN_PORT", "9123")
    monkeypatch.setenv(f"{PREFIX[service]}LOG_LEVEL", "debug")
    settings = read_settings(service, os.environ)
    assert (settings.listen_port, settings.log_level) == (9123, "debug")


@every_service
def test_an_empty_variable_is_unset(service, monkeypatch):
    """A variable that is set to nothing leaves the default, as compose files leave them."""
    monkeypatch.setenv(f"{PREFIX[service]}LISTEN_PORT", "")
    assert read_settings(service, os.environ) == service()


@every_service
@pytest.mark.parametrize(("typed", "meant"), [("LISTEN_PROT", "LISTEN_PORT"), ("MAX_BODY_BYTE", "MAX_BODY_BYTES")])
def test_an_unknown_variable_is_refused_with_a_suggestion(service, typed, meant, monkeypatch):
    """A typing error stops the start and says what was meant."""
    monkeypatch.setenv(f"{PREFIX[service]}{typed}", "1")
    with pytest.raises(SettingsError, match=f"{PREFIX[service]}{typed}: .*did you mean {PREFIX[service]}{meant}"):
        read_settings(service, os.environ)


def test_every_unknown_variable_is_listed(monkeypatch):
    """All typing errors are told at once; other services' variables are none of this one's business."""
    monkeypatch.setenv("EMBEDDING_MODLE", "x")
    monkeypatch.setenv("EMBEDDING_PRECISON", "x")
    monkeypatch.setenv("RERANK_ANYTHING", "x")
    with pytest.raises(SettingsError) as caught:
        read_settings(EmbeddingSettings, os.environ)
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == ["EMBEDDING_MODLE", "EMBEDDING_PRECISON"]


@pytest.mark.parametrize(
    ("service", "variable", "value"),
    [
        (EmbeddingSettings, "EMBEDDING_LISTEN_PORT", "http"),
        (EmbeddingSettings, "EMBEDDING_LISTEN_PORT", "65536"),
        (EmbeddingSettings, "EMBEDDING_LISTEN_PORT", "tcp://10.0.0.1:80"),
        (EmbeddingSettings, "EMBEDDING_PRECISION", "fp8"),
        (EmbeddingSettings, "EMBEDDING_HANG_S", "0"),
        (EmbeddingSettings, "EMBEDDING_MAX_BATCH_TOKENS", "1"),
        (RerankSettings, "RERANK_MAX_TOKENS", "8"),
        (RerankSettings, "RERANK_LOG_FORMAT", "xml"),
        (RerankSettings, "RERANK_ALLOW_OPEN_NETWORK", "perhaps"),
        (SearchSettings, "SEARCH_DENSE_WEIGHT", "1.5"),
        (SearchSettings, "SEARCH_DEFAULT_COLLECTION", "../etc"),
        (SearchSettings, "SEARCH_BREAKER_MIN_CALLS", "0"),
        (SearchSettings, "SEARCH_MAX_BODY_BYTES", "-1"),
        (SearchSettings, "SEARCH_REQUESTS_PER_S", "-1"),
        (RerankSettings, "RERANK_TOKENS_BURST", "0"),
        (EmbeddingSettings, "EMBEDDING_ACCESS_LOG", "some"),
    ],
)
def test_a_bad_value_names_its_variable(service, variable, value, monkeypatch):
    """A value out of range or of the wrong kind is told with the variable that has it."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError, match=f"^{variable}: "):
        read_settings(service, os.environ)


def test_every_bad_value_is_listed(monkeypatch):
    """All bad values are told at once."""
    monkeypatch.setenv("RERANK_LISTEN_PORT", "x")
    monkeypatch.setenv("RERANK_DEVICE", "abacus")
    with pytest.raises(SettingsError) as caught:
        read_settings(RerankSettings, os.environ)
    assert {line.split(":")[0] for line in str(caught.value).splitlines()} == {"RERANK_LISTEN_PORT", "RERANK_DEVICE"}


@every_service
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_an_open_network_must_be_said(service, host, monkeypatch):
    """Listening beyond this machine is refused unless it is allowed in as many words."""
    prefix = PREFIX[service]
    monkeypatch.setenv(f"{prefix}LISTEN_HOST", host)
    with pytest.raises(SettingsError, match=f"{prefix}ALLOW_OPEN_NETWORK=true"):
        read_settings(service, os.environ)
    monkeypatch.setenv(f"{prefix}ALLOW_OPEN_NETWORK", "true")
    assert read_settings(service, os.environ).listen_host == host


@every_service
@pytest.mark.parametrize("variable", ["API_KEY", "API_KEYS_FILE"])
def test_with_keys_the_network_may_be_open(service, variable, monkeypatch):
    """Whoever reaches the port needs a key then; the refusal without says so."""
    prefix = PREFIX[service]
    monkeypatch.setenv(f"{prefix}LISTEN_HOST", "0.0.0.0")
    with pytest.raises(SettingsError, match=f"set {prefix}API_KEY or {prefix}API_KEYS_FILE"):
        read_settings(service, os.environ)
    monkeypatch.setenv(f"{prefix}{variable}", "something")
    assert read_settings(service, os.environ).listen_host == "0.0.0.0"


@every_service
def test_a_key_is_never_printed(service, monkeypatch):
    """Neither by the settings nor by an error about them."""
    monkeypatch.setenv(f"{PREFIX[service]}API_KEY", "hush-hush")
    settings = read_settings(service, os.environ)
    assert settings.api_key.get_secret_value() == "hush-hush"
    assert "hush" not in f"{settings!r} {settings}"
    monkeypatch.setenv(f"{PREFIX[service]}LISTEN_PORT", "x")
    with pytest.raises(SettingsError) as caught:
        read_settings(service, os.environ)
    assert "hush" not in str(caught.value)


def test_origins_come_with_commas(monkeypatch):
    """A list is written as people write lists."""
    monkeypatch.setenv("SEARCH_CORS_ORIGINS", "https://a.example, https://b.example,")
    assert read_settings(SearchSettings, os.environ).cors_origins == ("https://a.example", "https://b.example")
    monkeypatch.delenv("SEARCH_CORS_ORIGINS")
    assert read_settings(SearchSettings, os.environ).cors_origins == ()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_this_machine_is_always_allowed(host, monkeypatch):
    """Every name of the loopback interface is fine."""
    monkeypatch.setenv("SEARCH_LISTEN_HOST", host)
    assert read_settings(SearchSettings, os.environ).listen_host == host


@every_service
def test_settings_are_frozen(service):
    """Nothing changes a setting after the start."""
    with pytest.raises(ValidationError, match="frozen"):
        service().listen_port = 1


def test_the_redis_url_has_no_prefix(monkeypatch):
    """REDIS_URL is read under the name that everybody gives it."""
    monkeypatch.setenv("REDIS_URL", "redis://cache:6379/0")
    assert read_settings(SearchSettings, os.environ).redis_url == "redis://cache:6379/0"
    assert variable_names(SearchSettings)["REDIS_URL"] == "redis_url"


@every_service
def test_the_table_has_a_row_for_each_variable(service: type[ServiceSettings]):
    """The documentation's table names every variable that is read."""
    rows = settings_table(service).splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == list(variable_names(service))
