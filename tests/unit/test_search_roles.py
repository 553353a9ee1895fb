"""What each role of the search process must be told, and where nodes are."""

import pytest

from services.common.settings import SettingsError, read_settings
from services.search.settings import SearchSettings

LEDGER = {"SEARCH_LEDGER_URL": "postgresql://user@db/tercet"}


def read(monkeypatch: pytest.MonkeyPatch, **environ: str) -> SearchSettings:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    return read_settings(SearchSettings, environ)


def test_nodes_are_separated_by_semicolons_and_their_replicas_by_commas(monkeypatch) -> None:
    """In the order of their numbers."""
    nodes = " http://a:8010/, http://a2:8010 ;https://b"
    settings = read(monkeypatch, SEARCH_ROLE="router", SEARCH_SHARD_NODES=nodes, **LEDGER)
    assert settings.nodes() == [["http://a:8010", "http://a2:8010"], ["https://b"]]


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"SEARCH_ROLE": "shard"}, "SEARCH_LEDGER_URL"),
        ({"SEARCH_ROLE": "router", **LEDGER}, "SEARCH_SHARD_NODES"),
        ({"SEARCH_ROLE": "router", "SEARCH_SHARD_NODES": "a:8010", **LEDGER}, "http://name:port"),
        ({"SEARCH_ROLE": "router", "SEARCH_SHARD_NODES": "http://a;;http://b", **LEDGER}, "http://name:port"),
        ({"SEARCH_SHARD_NODES": "http://a:8010"}, "SEARCH_ROLE=router"),
        ({"SEARCH_SHARD_NODE": "2", "SEARCH_SHARD_NODE_COUNT": "2"}, "must be below"),
        ({"SEARCH_FALLBACK": "elsewhere"}, "SEARCH_FALLBACK"),
    ],
)
def test_settings_that_do_not_fit_together_stop_the_start(monkeypatch, environ, message) -> None:
    """The message names the variable that is missing or wrong."""
    with pytest.raises(SettingsError, match=message):
        read(monkeypatch, **environ)


def test_the_default_needs_nothing(monkeypatch) -> None:
    """One process with a SQLite ledger and no fallback."""
    settings = read(monkeypatch)
    assert (settings.role, settings.ledger_url, settings.nodes(), settings.fallback) == ("all", None, [], "off")


def test_a_new_collection_has_a_shard_for_each_node(monkeypatch) -> None:
    """One where all are in this process, and as many as were said where that was said."""
    assert SearchSettings().shards_of_a_new_collection == 1
    router = read(monkeypatch, SEARCH_ROLE="router", SEARCH_SHARD_NODES="http://a;http://b,http://b2", **LEDGER)
    assert router.shards_of_a_new_collection == 2
    told = read(monkeypatch, SEARCH_DEFAULT_SHARDS="3")
    assert told.shards_of_a_new_collection == 3
