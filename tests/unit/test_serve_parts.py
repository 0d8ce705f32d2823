"""Parts of ``g2r serve`` without processes: the guard, the backlog, the cache, messages, spans of characters, the key.

The whole over HTTP is in tests/runs/test_serve.py.
"""

import asyncio
import struct
from itertools import pairwise

import httpx
import pytest

from g2r_megatron.config.presets import PRESETS, fill_from_preset
from g2r_megatron.config.serve_checks import api_key, check_serve_config
from g2r_megatron.config.serve_options import ServeConfig, ServiceConfig
from g2r_megatron.data.token_spans import encoded_bounds
from g2r_megatron.errors import UserError
from g2r_megatron.serve.answers import character_spans
from g2r_megatron.serve.backlog import Backlog, Full, Waiting
from g2r_megatron.serve.cache import Cache
from g2r_megatron.serve.guard import Guard
from g2r_megatron.serve.protocol import MAX_BODY, packed, read_message
from test_alignment import byte_bpe

KEY = "correct horse battery"


async def echo(scope, receive, send):
    body = (await receive())["body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


def answer(method: str, path: str, key: str = KEY, base_url: str = "http://judge", **request) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(Guard(echo, key, 10, 1.0))
        async with httpx.AsyncClient(transport=transport, base_url=base_url) as http:
            return await http.request(method, path, **request)

    return asyncio.run(ask())


WRONG = ["", "Bearer", f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Bearer {KEY.upper()}"]


@pytest.mark.parametrize("value", WRONG)
@pytest.mark.parametrize("path", ["/v1/credit", "/v1/models", "/metrics"])
def test_the_key_is_needed(path, value):
    found = answer("GET", path, headers={"authorization": value})
    assert found.status_code == 401 and found.headers["www-authenticate"] == "Bearer"
    assert KEY not in found.text


def test_the_key_opens_and_health_needs_none():
    headers = {"authorization": f"bearer {KEY}", "content-type": "application/json"}
    found = answer("POST", "/v1/credit", headers=headers, content=b"{}")
    assert found.status_code == 200 and found.content == b"{}"
    assert answer("GET", "/healthz").status_code == 200
    assert "default-src 'none'" in found.headers["content-security-policy"]


@pytest.mark.parametrize("host", ["judge.example", "127.0.0.1.evil.example", "localhost.evil", ""])
def test_without_a_key_only_local_names_are_answered(host):
    """A page of another site whose name resolves to this machine cannot use the service."""
    assert answer("GET", "/", key="", headers={"host": host}).status_code == 421


@pytest.mark.parametrize("host", ["localhost:80", "127.0.0.1:8000", "[::1]:8000", "[::1]"])
def test_local_names(host):
    assert answer("GET", "/", key="", headers={"host": host}).status_code == 200


def test_the_body_is_counted_when_its_length_is_not_stated():
    async def parts():
        for _ in range(6):
            yield b"[[]"

    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    assert answer("POST", "/v1/score", headers=headers, content=parts()).status_code == 413
    assert answer("GET", "/healthz", headers={"content-length": "3"}).status_code == 413


def waiting(rows: int = 1, size: int = 1) -> Waiting:
    return Waiting("credit", b" " * size, rows, asyncio.new_event_loop().create_future())


def test_the_backlog_is_bounded_and_in_order():
    backlog = Backlog(3, 10)
    jobs = [waiting(rows=2), waiting(rows=3), waiting(rows=9)]
    for job in jobs:
        backlog.add(job)
    with pytest.raises(Full):
        backlog.add(waiting())
    assert backlog.rows == 14 and backlog.take(5) == jobs[:2] and backlog.take(5) == jobs[2:] and backlog.take(5) == []
    large = waiting(size=50)
    backlog.add(large)  # alone
    with pytest.raises(Full):
        backlog.add(waiting())
    assert backlog.remove(large) and not backlog.remove(large)
    backlog.add(waiting(size=10))


def test_the_cache_keeps_the_last_used_within_its_bytes():
    cache = Cache(10)
    first, second, third = (Cache.key(kind, b"x") for kind in ("a", "b", "c"))
    cache.put(first, b"1234")
    cache.put(second, b"1234")
    assert cache.get(first) == b"1234"
    cache.put(third, b"1234")
    assert (cache.get(first), cache.get(second), cache.get(third)) == (b"1234", None, b"1234")
    cache.put(second, b"12345678901")
    assert cache.get(second) is None and cache.bytes == 8


def test_messages_are_read_back_and_foreign_ones_are_refused():
    async def read(raw: bytes):
        reader = asyncio.StreamReader()
        reader.feed_data(raw)
        reader.feed_eof()
        return await read_message(reader)

    message = packed({"id": 3}, b"\x00body")
    assert asyncio.run(read(message)) == ({"id": 3}, b"\x00body")
    assert asyncio.run(read(message[:-1])) is None
    assert asyncio.run(read(struct.pack("!II", 2, MAX_BODY + 1) + b"{}")) is None


def test_spans_of_characters_cover_the_text():
    """Also characters of several bytes, which several tokens share."""
    text = "Température 39 °C 🙂 a"
    _, bounds = encoded_bounds(byte_bpe(300), text, continues=False)
    spans = character_spans(text, bounds.tolist())
    assert {i for first, last in spans for i in range(first, last)} == set(range(len(text)))
    assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in pairwise(spans))
    face = [span for span in spans if span[0] <= text.index("🙂") < span[1]]
    assert len(face) > 1


def served(**options) -> ServeConfig:
    config = ServeConfig(serve=ServiceConfig(**options))
    config.judge = fill_from_preset(config.judge, PRESETS["robust"]["judge"])
    config.judge.model = "model"
    return config


def test_an_address_that_others_reach_needs_a_key(tmp_path, monkeypatch):
    monkeypatch.delenv("G2R_API_KEY", raising=False)
    check_serve_config(served(), 1)
    for host in ("0.0.0.0", "10.0.0.1", "example.org", "::"):
        with pytest.raises(UserError, match="without an API key"):
            check_serve_config(served(host=host), 1)
    (tmp_path / "key").write_text(KEY + "\n")
    check_serve_config(served(host="0.0.0.0", api_key_file=str(tmp_path / "key")), 1)
    assert api_key(ServiceConfig(api_key_file=str(tmp_path / "key"))) == KEY
    monkeypatch.setenv("G2R_API_KEY", "short")
    with pytest.raises(UserError, match="16 or more"):
        check_serve_config(served(), 1)
