"""Requests reach LM Studio as they were sent, except for what belongs to the connection."""

from __future__ import annotations

import hashlib
import http.client
import json
import socket
import string
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import unquote_to_bytes

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.processes import Gateway, Simulator

MIB = 1 << 20
EXAMPLES = settings(max_examples=40, deadline=None, derandomize=True)
TEXT = string.ascii_letters + string.digits + "!#$&'()*+,/:;=?@[]{}|^`<>\"-._~"
QUERIES = st.text(TEXT.replace("#", ""), max_size=60) | st.binary(max_size=20).map(
    lambda data: "q=" + "".join(f"%{byte:02X}" for byte in data)
)
VALUES = st.text(TEXT + " \t%\\éÿ", min_size=1, max_size=60).map(str.strip).filter(bool)


def send(
    gateway: Gateway,
    method: str,
    target: str,
    headers: list[tuple[str, str]] | None = None,
    body: bytes | Iterator[bytes] = b"",
) -> tuple[http.client.HTTPResponse, bytes]:
    """Send a request without what http.client adds to it; returns the response and its body."""
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=60)
    connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
    given_headers = [("Host", "front.localhost"), *(headers or [])]
    if isinstance(body, bytes) and body:
        given_headers.append(("Content-Length", str(len(body))))
    for name, value in given_headers:
        connection.putheader(name, value.encode("latin-1"))
    if not isinstance(body, bytes):
        connection.putheader("Transfer-Encoding", "chunked")
        connection.endheaders(body, encode_chunked=True)
    else:
        connection.endheaders(body or None)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response, content


def headers_of(record: dict[str, Any]) -> dict[str, str]:
    return {name.lower(): value for name, value in record["headers"]}


@EXAMPLES
@given(body=st.binary(min_size=1, max_size=3000), pieces=st.integers(0, 5))
def test_any_upload_arrives_byte_for_byte(
    shared_gateway: Gateway, shared_simulator: Simulator, body: bytes, pieces: int
) -> None:
    kind = ("Content-Type", 'multipart/form-data; boundary="x y"')
    step = max(1, len(body) // (pieces or 1))
    chunks = (body[at : at + step] for at in range(0, len(body), step))
    upload: Any = chunks if pieces else body
    send(shared_gateway, "POST", "/v1/audio/transcriptions", [kind], upload)
    record = shared_simulator.last_request()
    assert record["body"] == body
    sent = headers_of(record)
    assert sent["content-type"] == kind[1]
    assert ("transfer-encoding" in sent) == bool(pieces)
    assert sent.get("content-length") == (None if pieces else str(len(body)))


@EXAMPLES
@given(
    members=st.dictionaries(
        st.text(max_size=8), st.integers() | st.text() | st.floats(), max_size=4
    )
)
def test_a_chat_with_a_model_arrives_byte_for_byte(
    shared_gateway: Gateway, shared_simulator: Simulator, members: dict[str, Any]
) -> None:
    members = {**members, "model": "qwen2-1.5b-instruct"} | {"stream": False}
    try:
        body = json.dumps(members, allow_nan=False, indent=1).encode()
    except ValueError:
        return
    send(shared_gateway, "POST", "/v1/chat/completions", body=body)
    assert shared_simulator.last_request()["body"] == body


@EXAMPLES
@given(query=QUERIES, value=VALUES, name=st.text(string.ascii_lowercase + "-", max_size=20))
def test_any_query_and_header_value_arrive(
    shared_gateway: Gateway, shared_simulator: Simulator, query: str, value: str, name: str
) -> None:
    name = f"x-test-{name}"
    send(shared_gateway, "GET", f"/v1/models?{query}", [(name, value)])
    record = shared_simulator.last_request()
    assert record["target"] == f"/v1/models?{query}"
    assert headers_of(record)[name] == value


@pytest.mark.parametrize(
    "method", ["GET", "HEAD", "OPTIONS", "DELETE", "PUT", "PATCH", "PROPFIND", "FOO", "POST"]
)
def test_any_method_arrives(gateway: Gateway, simulator: Simulator, method: str) -> None:
    body = b"some bytes" if method in ("PUT", "PATCH", "PROPFIND", "FOO", "POST", "DELETE") else b""
    response, content = send(gateway, method, "/v1/some/thing?a=1", body=body)
    record = simulator.last_request()
    assert (record["method"], record["target"]) == (method, "/v1/some/thing?a=1")
    assert record["body"] == body
    if method == "HEAD":
        assert content == b""
    else:
        assert response.status == 404
        assert (
            f"Unexpected endpoint or method. ({method} " in json.loads(content)["error"]["message"]
        )


SHORTHAND = ["chat/completions", "completions", "embeddings", "responses", "messages"]
SHORTHAND += ["images/generations", "audio/transcriptions", "audio/translations", "models"]


@pytest.mark.parametrize("path", SHORTHAND)
def test_shorthand_paths_go_to_v1(gateway: Gateway, simulator: Simulator, path: str) -> None:
    send(gateway, "POST", f"/{path}?x=%2F", body=b'{"model":"no-such-model"}')
    record = simulator.last_request()
    assert record["target"] == f"/v1/{path}?x=%2F"
    assert record["body"] == b'{"model":"no-such-model"}'


@pytest.mark.parametrize("prefix", ["/v1/models/", "/models/"])
@pytest.mark.parametrize("model", ["publisher%2fmodel-with-slash", "publisher%2Fmodel-with-slash"])
def test_an_encoded_slash_in_a_model_id_arrives_unchanged(
    gateway: Gateway, simulator: Simulator, prefix: str, model: str
) -> None:
    response, content = send(gateway, "GET", prefix + model)
    assert simulator.last_request()["target"] == f"/v1/models/{model}"
    assert response.status == 200
    assert json.loads(content)["id"] == unquote_to_bytes(model).decode()


ESCAPES = [
    "/v1/../admin/models", "/v1/%2e%2e/admin", "/v1/%252e%252e/admin", "/v1/..%2fadmin",
    "/v1/a/..%5cadmin", "/v1/..\\admin", "/v1\\..\\admin", "//evil.example/v1/models",
    "/%2fevil.example/v1/models", "/v1/./models", "/v1/%2e/models", "/v1/..;x/admin",
    "http://evil.example/admin/../v1/../x", "/models/../_simulator/state", "/api/../v1/models/..",
    "/v1/%c0%ae%c0%ae/../x", "/v1/a%00b", "/v1/a%0d%0aX-Evil:1",
]  # fmt: skip


@pytest.mark.parametrize("target", ESCAPES)
def test_a_path_never_escapes(gateway: Gateway, simulator: Simulator, target: str) -> None:
    lines = ["Host: localhost", "Content-Length: 0", "Connection: close"]
    request = "\r\n".join([f"POST {target} HTTP/1.1", *lines, "", ""])
    with socket.create_connection(("127.0.0.1", gateway.port), 10) as client:
        client.sendall(request.encode())
        response = b""
        while piece := client.recv(65536):
            response += piece
    assert response.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 404 ")), response
    assert b'"error"' in response
    assert simulator.requests() == []


def test_an_absolute_target_goes_to_lmstudio_and_nowhere_else(
    gateway: Gateway, simulator: Simulator
) -> None:
    response, _ = send(gateway, "GET", "http://evil.example/v1/models?x=1")
    assert response.status == 200
    record = simulator.last_request()
    assert record["target"] == "/v1/models?x=1"
    assert headers_of(record)["host"] == simulator.url.removeprefix("http://")


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_a_large_upload_is_not_buffered(
    simulator: Simulator, launch: Callable[..., Gateway], chunked: bool
) -> None:
    gateway = launch(WEB_CONCURRENCY=1)
    send(gateway, "POST", "/v1/audio/transcriptions", body=b"warm up")
    worker = psutil.Process(gateway.workers()[0])
    before = worker.memory_info().rss
    block = bytes(range(256)) * 256
    upload: Any = (block for _ in range(20 * MIB // len(block)))
    whole = block * (20 * MIB // len(block))
    peak = 0

    def measured() -> Iterator[bytes]:
        nonlocal peak
        for piece in upload:
            peak = max(peak, worker.memory_info().rss)
            yield piece

    if chunked:
        send(gateway, "POST", "/v1/audio/transcriptions", body=measured())
    else:
        length = [("Content-Length", str(len(whole)))]
        connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=60)
        connection.request("POST", "/v1/audio/transcriptions", measured(), dict(length))
        connection.getresponse().read()
        connection.close()
    record = simulator.last_request()
    assert record["bodyLength"] == 20 * MIB
    assert record["bodySha256"] == hashlib.sha256(whole).hexdigest()
    assert peak - before < 15 * MIB
    assert worker.memory_info().rss - before < 15 * MIB
