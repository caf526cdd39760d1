"""Headers, framing and content codings, in both directions."""

from __future__ import annotations

import gzip
import http.client
import json
import socket
from collections.abc import Callable
from typing import Any

import pytest

from tests.processes import Gateway, Simulator

MODEL = "qwen2-1.5b-instruct"
CHAT = json.dumps(
    {"model": MODEL, "messages": [{"role": "user", "content": "count to 3"}]}
).encode()


def ask(gateway: Gateway, headers: dict[str, str]) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=60)
    try:
        connection.request("POST", "/v1/chat/completions", CHAT, headers)
        response = connection.getresponse()
        return response, response.read()
    finally:
        connection.close()


def received(simulator: Simulator) -> dict[str, str]:
    """The headers that LM Studio received, none of them twice."""
    pairs = simulator.last_request()["headers"]
    found = {name.lower(): value for name, value in pairs}
    assert len(found) == len(pairs)
    return found


def test_hop_by_hop_headers_and_those_named_in_connection_are_dropped(
    gateway: Gateway, simulator: Simulator
) -> None:
    hops = {
        "Connection": "close, X-Hop , x-other-hop",
        "X-Hop": "1",
        "X-Other-Hop": "2",
        "Keep-Alive": "timeout=5",
        "TE": "trailers",
        "Trailer": "X-Sum",
        "Proxy-Authorization": "Basic abc",
        "Proxy-Connection": "keep-alive",
        "X-Kept": "yes",
    }
    ask(gateway, hops)
    found = received(simulator)
    assert found["x-kept"] == "yes"
    dropped = {name.lower() for name in hops} - {"x-kept", "connection"}
    assert not dropped & set(found)
    assert "hop" not in found.get("connection", "").lower()


def test_lmstudios_hop_by_hop_headers_are_dropped_and_the_others_relayed(
    launch: Callable[..., Gateway],
) -> None:
    response = (
        b"HTTP/1.1 201 Made It\r\nContent-Length: 2\r\nConnection: X-Hop, close\r\nX-Hop: 1\r\n"
        b"Keep-Alive: timeout=5\r\nProxy-Authenticate: Basic\r\nTrailer: X-Sum\r\n"
        b"Upgrade: h2c\r\nX-Kept: a\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\n"
        b"Content-Type: text/x-odd; charset=ascii\r\nETag: W/\"1\"\r\n\r\nok"
    )  # fmt: skip
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(30)
        gateway = launch(f"http://127.0.0.1:{listener.getsockname()[1]}", WEB_CONCURRENCY=1)
        with socket.create_connection(("127.0.0.1", gateway.port), 10) as client:
            client.sendall(b"GET /v1/odd HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            upstream, _ = listener.accept()
            with upstream:
                upstream.recv(65536)
                upstream.sendall(response)
                relayed = http.client.HTTPResponse(client)
                relayed.begin()
                assert relayed.read() == b"ok"
    assert (relayed.status, relayed.reason) == (201, "Made It")
    names = {name.lower() for name in relayed.headers}
    assert not names & {"x-hop", "keep-alive", "proxy-authenticate", "trailer", "upgrade"}
    assert "x-hop" not in relayed.getheader("Connection", "").lower()
    assert relayed.headers["X-Kept"] == "a"
    assert relayed.headers.get_all("Set-Cookie") == ["a=1", "b=2"]
    assert relayed.headers["Content-Type"] == "text/x-odd; charset=ascii"
    assert relayed.headers["ETag"] == 'W/"1"'


def test_secrets_never_reach_lmstudio(strict: Gateway, simulator: Simulator) -> None:
    key = "inference-key-0123456789"
    secrets = {"Authorization": f"Bearer {key}", "X-API-Key": key, "Cookie": "session=hidden"}
    response, _ = ask(strict, secrets)
    assert response.status == 200
    record = simulator.last_request()
    assert not {name.lower() for name in secrets} & set(received(simulator))
    assert key not in json.dumps(record["headers"])
    assert "hidden" not in json.dumps(record["headers"])


def test_host_and_length_are_those_of_the_upstream_exchange(
    gateway: Gateway, simulator: Simulator
) -> None:
    ask(gateway, {"Host": "front.localhost:99", "Expect": "100-continue"})
    found = received(simulator)
    assert found["host"] == simulator.url.removeprefix("http://")
    assert found["content-length"] == str(len(CHAT))
    assert "expect" not in found
    assert found["x-forwarded-host"] == "front.localhost:99"


FORGED = {
    "X-Forwarded-For": "6.6.6.6",
    "X-Forwarded-Proto": "https",
    "X-Forwarded-Host": "evil.example",
    "X-Forwarded-Port": "666",
    "Forwarded": "for=6.6.6.6",
}


def test_an_untrusted_peers_forwarded_headers_are_replaced(
    gateway: Gateway, simulator: Simulator
) -> None:
    ask(gateway, FORGED)
    found = received(simulator)
    assert found["x-forwarded-for"] == "127.0.0.1"
    assert found["x-forwarded-proto"] == "http"
    assert found["x-forwarded-host"] == f"127.0.0.1:{gateway.port}"
    assert "6.6.6.6" not in json.dumps(found)
    assert "666" not in found.get("x-forwarded-port", "")


def test_a_trusted_proxys_forwarded_headers_are_extended(
    simulator: Simulator, launch: Callable[..., Gateway]
) -> None:
    ask(launch(TRUSTED_PROXIES="127.0.0.1/32", WEB_CONCURRENCY=1), FORGED)
    found = received(simulator)
    assert found["x-forwarded-for"] == "6.6.6.6, 127.0.0.1"
    assert found["x-forwarded-proto"] == "https"
    assert found["x-forwarded-host"] == "evil.example"


def test_a_response_that_is_compressed_all_the_same_is_relayed_unchanged(
    gateway: Gateway, simulator: Simulator
) -> None:
    gzipped = {"Accept-Encoding": "gzip", "X-Simulator-Fault": "gzip"}
    response, content = ask(gateway, gzipped)
    record = simulator.last_request()
    assert received(simulator)["accept-encoding"] == "identity"
    assert response.status == 200
    assert response.getheader("Content-Encoding") == "gzip"
    assert response.getheader("Content-Length") == str(len(content))
    assert content == record["sent"]
    assert json.loads(gzip.decompress(content))


def test_a_compressed_request_is_relayed_unchanged(gateway: Gateway, simulator: Simulator) -> None:
    body = gzip.compress(CHAT)
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
    gateway.http.post(gateway.url + "/v1/chat/completions", data=body, headers=headers, timeout=30)
    assert simulator.last_request()["body"] == body
    assert received(simulator)["content-encoding"] == "gzip"


def test_a_large_response_is_relayed_unchanged(gateway: Gateway, simulator: Simulator) -> None:
    response, content = ask(gateway, {"X-Simulator-Fault": "big-answer"})
    record = simulator.last_request()
    assert response.getheader("Content-Length") == dict(record["sentHeaders"])["Content-Length"]
    assert content.startswith(record["sent"])
    assert json.loads(content)["choices"][0]["message"]["content"] == "word " * ((5 << 20) // 5)


def test_a_response_without_a_length_is_complete(gateway: Gateway, simulator: Simulator) -> None:
    response, content = ask(gateway, {"X-Simulator-Fault": "no-length"})
    assert response.getheader("Content-Length") is None
    assert content == simulator.last_request()["sent"]


def test_clients_notice_that_a_plain_response_broke_off(
    gateway: Gateway, simulator: Simulator
) -> None:
    with pytest.raises(http.client.IncompleteRead) as caught:
        ask(gateway, {"X-Simulator-Fault": "break-plain"})
    assert caught.value.partial == simulator.last_request()["sent"]


@pytest.mark.parametrize("fault", ["", "no-length"])
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_an_http_1_0_client_gets_no_chunks(
    gateway: Gateway, simulator: Simulator, fault: str, stream: bool
) -> None:
    body: Any = {**json.loads(CHAT), "stream": stream, "stream_options": {"include_usage": True}}
    content = json.dumps(body).encode()
    request = f"POST /v1/chat/completions HTTP/1.0\r\nContent-Length: {len(content)}\r\n"
    request += f"X-Simulator-Fault: {fault}\r\n\r\n" if fault else "\r\n"
    with socket.create_connection(("127.0.0.1", gateway.port), 10) as client:
        client.sendall(request.encode() + content)
        response = b""
        while piece := client.recv(65536):
            response += piece
    head, _, payload = response.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert payload == simulator.last_request()["sent"]


@pytest.mark.parametrize(("key", "status"), [("inference-key-0123456789", 403), ("", 401)])
def test_the_native_api_needs_the_admin_key(
    strict: Gateway, simulator: Simulator, key: str, status: int
) -> None:
    admin = {"Authorization": "Bearer admin-key-0123456789abc"}
    assert strict.get("/api/v1/models?x=1", headers=admin).json()["models"]
    assert simulator.last_request()["target"] == "/api/v1/models?x=1"
    rejected = strict.get("/api/v0/models", headers={"Authorization": f"Bearer {key}"})
    assert rejected.status_code == status
    assert len(simulator.requests()) == 1
