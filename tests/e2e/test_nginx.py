"""deploy/nginx.conf, unchanged except for its addresses, in a real nginx, with a real gateway.

The gateway admits only 127.0.0.2, which is not nginx's own address; clients connect from there.
"""

from __future__ import annotations

import json
import re
import ssl
import tempfile
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from pathlib import Path
from typing import Any

import psutil
import pytest
import trustme

from gateway.serving.connection import KEEP_ALIVE
from gateway.settings import TABLE
from tests.nginx import Nginx
from tests.processes import Gateway, Simulator, eventually, free_port

MODEL = "qwen2-1.5b-instruct"
CHAT = "/v1/chat/completions"
ALLOWED, OTHER = "127.0.0.2", "127.0.0.3"
#: How nginx reaches the gateway, and the TRUSTED_PROXIES that it needs.
TRUSTED = {"tcp": "127.0.0.1", "unix": "unix"}


@pytest.fixture(scope="module", params=TRUSTED)
def gateway(request: pytest.FixtureRequest, shared_simulator: Simulator) -> Iterator[Gateway]:
    # the path of a Unix socket must be short, which pytest's folders are not
    with tempfile.TemporaryDirectory() as folder:
        host = f"unix:{folder}/gateway.sock" if request.param == "unix" else "127.0.0.1"
        gateway = Gateway(
            Path(folder),
            shared_simulator.url,
            GATEWAY_HOST=host,
            TRUSTED_PROXIES=TRUSTED[request.param],
            IP_ALLOWLIST=ALLOWED,
            WEB_CONCURRENCY=1,
        )
        yield gateway
        gateway.stop()


@pytest.fixture(scope="module")
def nginx(gateway: Gateway) -> Iterator[Nginx]:
    front = start(gateway)
    yield front
    front.stop()


def start(gateway: Gateway, **options: Any) -> Nginx:
    upstream = f"unix:{gateway.unix}" if gateway.unix else gateway.url
    return Nginx(Path(tempfile.mkdtemp(dir=gateway.folder)), upstream, **options)


class Client(HTTPConnection):
    """A client of nginx with its own address."""

    response: HTTPResponse | None = None

    def __init__(self, nginx: Nginx, address: str = ALLOWED) -> None:
        super().__init__("127.0.0.1", nginx.port, timeout=60, source_address=(address, 0))

    def ask(self, path: str, body: dict[str, Any] | None = None, **headers: str) -> HTTPResponse:
        content = None if body is None else json.dumps(body)
        named = {} if body is None else {"Content-Type": "application/json"}
        named |= {name.replace("_", "-"): value for name, value in headers.items()}
        self.request("GET" if body is None else "POST", path, content, named)
        # kept, because it may own the socket by now
        self.response = self.getresponse()
        return self.response

    def close(self) -> None:
        super().close()
        if self.response is not None:
            self.response.close()


@pytest.fixture
def client(nginx: Nginx, simulator: Simulator) -> Iterator[Client]:
    client = Client(nginx)
    yield client
    client.close()


def chat(count: int, stream: bool) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"count to {count}"}]
    return {"model": MODEL, "messages": messages, "stream": stream}


def directives(nginx: Nginx) -> dict[str, str]:
    """The directives of deploy/nginx.conf, as nginx parsed them; of repeated ones, the last."""
    site = nginx.configuration().partition("site.conf:")[2]
    return dict(re.findall(r"^\s*(\w+) +(.*);$", site, re.MULTILINE))


def seconds(text: str) -> int:
    return int(text[:-1]) * {"s": 1, "m": 60, "h": 3600}[text[-1]]


def test_the_limits_agree_with_the_gateways_own(nginx: Nginx) -> None:
    found = directives(nginx)
    largest = next(s.default for s in TABLE if s.variable == "MAX_BODY_BYTES")
    assert found["client_max_body_size"] == f"{int(largest) // 2**20}m"
    assert int(largest) % 2**20 == 0
    assert f"MAX_BODY_BYTES: {largest}\n" in (nginx.folder / "site.conf").read_text()
    # nginx's default limit of 60 s for idle connections to the gateway stays in place
    assert "keepalive_timeout" not in found
    assert KEEP_ALIVE > 60
    # the longest legitimate silence: a plain load of a large model from a slow disk
    assert seconds(found["proxy_read_timeout"]) >= 1800
    assert seconds(found["proxy_send_timeout"]) >= 1800


def test_a_token_arrives_before_the_next_one_is_generated(client: Client) -> None:
    response = client.ask(CHAT, chat(5, True), X_Simulator_Pace_Ms="60000")
    received = b""
    while b'"content":"1 "' not in received:
        piece = response.read1(65536)
        assert piece
        received += piece
    assert b'"content":"2 "' not in received


def test_a_stream_arrives_complete(client: Client) -> None:
    assert client.ask(CHAT, chat(5, True)).read().endswith(b"data: [DONE]\n\n")


def test_events_arrive_as_they_happen(client: Client, nginx: Nginx) -> None:
    events = client.ask("/debug/stream")
    assert b"retry: 3000" in events.readline()
    other = Client(nginx)
    other.ask(CHAT, chat(2, False)).read()
    other.close()
    while (line := events.readline()) != b"event: inference_start\n":
        assert line
    assert MODEL.encode() in events.readline()


def test_an_upload_is_not_buffered(client: Client, simulator: Simulator) -> None:
    """LM Studio receives the request while the client is still sending its body."""
    client.putrequest("POST", "/v1/audio/transcriptions")
    client.putheader("Content-Type", "multipart/form-data; boundary=x")
    client.putheader("Content-Length", "1000000")
    client.endheaders(b"--x\r\n")
    eventually(lambda: [r for r in simulator.requests() if r["method"] == "POST"])


@pytest.mark.parametrize("stream", [True, False], ids=["events", "plain"])
def test_only_the_read_timeout_cuts_a_long_load(
    gateway: Gateway, nginx: Nginx, simulator: Simulator, stream: bool
) -> None:
    """A silent load of 4 s is cut by a read timeout of 2 s, and not by the one in the file.

    The ratio is that of a load of two minutes and nginx's default of 60 s;
    ``python -m tests.soak.longload`` tests a load that long.
    """
    simulator.faults(load_ms=4000)
    accept = "text/event-stream" if stream else "*/*"
    short_timeout = start(gateway, changes={"proxy_read_timeout 1h;": "proxy_read_timeout 2s;"})
    try:
        for front, cut in ((short_timeout, not stream), (nginx, False)):
            client = Client(front)
            response = client.ask("/admin/models/load", {"modelKey": MODEL}, Accept=accept)
            content = response.read()
            client.close()
            assert response.status == (504 if cut else 200), content
            assert cut or b'"status":"loaded"' in content.replace(b": ", b":")
            if cut:
                eventually(lambda: simulator.state()["loads"][-1]["outcome"] == "cancelled")
    finally:
        short_timeout.stop()


def test_the_allowlist_applies_to_the_real_client(nginx: Nginx, simulator: Simulator) -> None:
    forgeries: list[dict[str, str]] = [
        {},
        {"X_Forwarded_For": ALLOWED},
        {"X_Forwarded_For": f"{ALLOWED}, {ALLOWED}"},
        {"X_Forwarded_For": "127.0.0.1"},
        {"X_Forwarded_For": "unix"},
        {"X_Real_IP": ALLOWED, "Forwarded": f"for={ALLOWED}"},
    ]
    for address, status in ((ALLOWED, 200), (OTHER, 403)):
        for forged in forgeries:
            client = Client(nginx, address)
            response = client.ask("/v1/models", **forged)
            assert response.status == status, (address, forged, response.read())
            client.close()


def test_lm_studio_receives_the_address_of_the_real_client(
    client: Client, simulator: Simulator
) -> None:
    client.ask("/v1/models").read()
    headers = dict(simulator.last_request()["headers"])
    assert ALLOWED in headers["X-Forwarded-For"]
    assert headers["X-Forwarded-Proto"] == "http"


def test_connections_to_the_gateway_are_reused(gateway: Gateway, nginx: Nginx) -> None:
    def opened() -> set[Any]:
        """The worker's connections to nginx, without those to LM Studio, which may change."""
        (worker,) = map(psutil.Process, gateway.workers())
        kind = "unix" if gateway.unix else "tcp"
        return {
            (one.fd, one.raddr)
            for one in worker.net_connections(kind)
            if gateway.unix
            or (one.status == psutil.CONN_ESTABLISHED and one.laddr.port == gateway.port)
        }

    for _ in range(3):
        client = Client(nginx)
        assert client.ask("/v1/models").status == 200
        client.close()
    before = opened()
    for _ in range(10):
        client = Client(nginx)
        assert client.ask("/v1/models").status == 200
        client.close()
    assert opened() == before


def test_a_body_that_is_too_large_is_rejected(client: Client) -> None:
    client.putrequest("POST", CHAT)
    client.putheader("Content-Length", str(64 * 2**20 + 1))
    client.endheaders()
    assert client.getresponse().status == 413


def test_the_tls_lines_of_the_file_serve_https(
    gateway: Gateway, simulator: Simulator, tmp_path: Path
) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "crt")
    issued.private_key_pem.write_to_path(tmp_path / "key")
    port = free_port()
    lines = {
        "# listen 443 ssl;": f"listen 127.0.0.1:{port} ssl;",
        "# ssl_certificate /etc/nginx/lmstudio-gateway.crt;": f"ssl_certificate {tmp_path}/crt;",
        "# ssl_certificate_key /etc/nginx/lmstudio-gateway.key;": (
            f"ssl_certificate_key {tmp_path}/key;"
        ),
    }
    front = start(gateway, changes=lines)
    context = ssl.create_default_context()
    authority.configure_trust(context)
    client = HTTPSConnection(
        "127.0.0.1", port, timeout=60, context=context, source_address=(ALLOWED, 0)
    )
    client.request("POST", CHAT, json.dumps(chat(3, True)))
    assert client.getresponse().read().endswith(b"data: [DONE]\n\n")
    client.close()
    front.stop()
    assert dict(simulator.last_request()["headers"])["X-Forwarded-Proto"] == "https"
