"""API keys: where they may come from, what they may do, how they are compared, and what is wrong with a file of them."""

import ast
import hashlib
import inspect
import json
import textwrap
from pathlib import Path

import pytest

from services.common import auth
from services.common.auth import KeyRing, open_key_ring, presented_key
from services.common.errors import Forbidden, Unauthenticated
from services.common.governor import Limits
from services.common.settings import ServiceSettings, SettingsError


def entry(name: str, key: str, *scopes: str, **limits: float) -> dict[str, object]:
    """Return an entry of the file of keys."""
    return {"name": name, "sha256": hashlib.sha256(key.encode()).hexdigest(), "scopes": list(scopes), **limits}


@pytest.fixture
def ring(tmp_path: Path) -> KeyRing:
    """Three keys from a file, and the one plain key."""
    path = tmp_path / "keys.json"
    path.write_text(
        json.dumps(
            [
                entry("reader", "key-r", "search", requests_per_s=2.5, tokens_burst=7),
                entry("writer", "key-w", "search", "write"),
                entry("chief", "key-a", "admin", requests_per_s=0),
            ]
        )
    )
    found = open_key_ring(ServiceSettings(api_key="plain", api_keys_file=path, requests_per_s=80.0))
    assert found is not None
    return found


def test_without_keys_there_is_no_ring():
    """Nobody is asked for a key where none is set."""
    assert open_key_ring(ServiceSettings()) is None


@pytest.mark.parametrize(
    "headers",
    [
        {b"authorization": b"Bearer key-r"},
        {b"authorization": b"bearer  key-r "},
        {b"api-key": b"key-r"},
        {b"x-api-key": b"key-r"},
        {b"authorization": b"Basic dXNlcjpwYXNz", b"x-api-key": b"key-r"},
    ],
)
def test_a_key_may_come_in_three_headers(ring, headers):
    """As a bearer token, or as other products' clients send it; another scheme does not hide it."""
    assert ring.authenticate(headers, "search").name == "reader"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {b"authorization": b"key-r"},
        {b"authorization": b"Bearer"},
        {b"authorization": b"Bearer "},
        {b"authorization": b"Basic key-r"},
        {b"api-key": b""},
    ],
)
def test_no_key_is_unauthenticated(ring, headers):
    """The message says how to send one."""
    assert presented_key(headers) is None
    with pytest.raises(Unauthenticated, match="Authorization: Bearer"):
        ring.authenticate(headers, "search")


@pytest.mark.parametrize("key", [b"key-", b"key-r ", b"key-rr", b"KEY-R", b"\xff\xfe", b"x" * 10_000])
def test_a_wrong_key_is_unauthenticated(ring, key):
    """A part of a key, or one in capitals, is no key; the message does not repeat it."""
    with pytest.raises(Unauthenticated, match="not known") as caught:
        ring.authenticate({b"x-api-key": key}, "search")
    assert repr(key)[2:-1] not in caught.value.message


def test_the_digest_is_not_the_key(ring):
    """Who has read the file of keys cannot call."""
    digest = hashlib.sha256(b"key-r").hexdigest().encode()
    with pytest.raises(Unauthenticated):
        ring.authenticate({b"x-api-key": digest}, "search")


@pytest.mark.parametrize(
    ("key", "may"),
    [
        (b"key-r", {"search"}),
        (b"key-w", {"search", "write"}),
        (b"key-a", {"search", "embed", "rerank", "write", "admin"}),
        (b"plain", {"search", "embed", "rerank", "write", "admin"}),
    ],
)
def test_a_key_does_what_its_scopes_say(ring, key, may):
    """Each scope stands alone; `admin`, which the plain key has, is everything."""
    for scope in ("search", "embed", "rerank", "write", "admin"):
        if scope in may:
            ring.authenticate({b"api-key": key}, scope)
        else:
            with pytest.raises(Forbidden, match=f"does not have the scope '{scope}'"):
                ring.authenticate({b"api-key": key}, scope)


def test_every_key_is_compared_whole():
    """The search for a key calls the constant-time comparison for every key: it neither returns nor breaks on the way."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(KeyRing.find)))
    loop = next(node for node in ast.walk(tree) if isinstance(node, ast.For))
    assert not [node for node in ast.walk(loop) if isinstance(node, ast.Return | ast.Break | ast.Continue)]
    assert "compare_digest" in ast.unparse(loop)
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Compare)]


def test_all_keys_are_compared_whichever_fits(ring, monkeypatch):
    """The first key costs as many comparisons as the last, or none."""
    compared = []

    def counting(one: bytes, other: bytes) -> bool:
        compared.append(len(one))
        return one == other

    monkeypatch.setattr(auth.hmac, "compare_digest", counting)
    for key in (b"plain", b"key-a", b"unknown"):
        compared.clear()
        ring.find(key)
        assert compared == [32] * 4


def test_a_key_may_have_limits_of_its_own(ring):
    """What an entry leaves out is as the settings say; a rate of 0 lifts the limit."""
    limits = {key.name: key.limits for key in ring.keys}
    assert limits["reader"] == Limits(requests_per_s=2.5, tokens_burst=7)
    assert limits["writer"] == limits["default"] == Limits(requests_per_s=80.0)
    assert not limits["chief"].any


GOOD = entry("a", "k", "search")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"[\n{,}\n]", "line 2: not valid JSON"),
        (b"\xff\xfe[", "not valid UTF-8"),
        (b"{}", "the list of keys: .*valid list"),
        (b"[]", "the list of keys: .*at least 1 item"),
        ([GOOD, {**GOOD, "sha256": "abc"}], "key 2, sha256: "),
        ([{**GOOD, "scopes": []}], "key 1, scopes: "),
        ([{**GOOD, "scopes": ["search", "fly"]}], "key 1, scopes, 1: .*'embed'"),
        ([{**GOOD, "name": "two words"}], "key 1, name: "),
        ([{**GOOD, "key": "secret"}], "key 1, key: "),
        ([{**GOOD, "requests_per_s": -1}], "key 1, requests_per_s: "),
        ([{**GOOD, "requests_burst": 0}], "key 1, requests_burst: "),
        ([{"name": "a", "scopes": ["search"]}], "key 1, sha256: Field required"),
        ([GOOD, {**GOOD, "name": "b"}], "the digest of the key 'a' is there twice"),
        ([GOOD, entry("a", "other", "search")], "the name of the key 'a' is there twice"),
    ],
)
def test_a_bad_file_is_told_by_place(tmp_path, content, says):
    """The start is refused with the file and the line, or the key and its field; never with a key's text."""
    path = tmp_path / "keys.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(SettingsError, match=says) as caught:
        open_key_ring(ServiceSettings(api_keys_file=path))
    assert str(path) in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_missing_file_is_told(tmp_path):
    """The start is refused, and says which file it is."""
    with pytest.raises(SettingsError, match=r"nowhere\.json cannot be read: No such file"):
        open_key_ring(ServiceSettings(api_keys_file=tmp_path / "nowhere.json"))
