"""API token, TLS, ignored proxies, and a log without the SDK's messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trustme

from tests.processes import Gateway, Simulator, eventually, free_port

TOKEN = "sk-lm-AbCdEf12:0123456789abcdefghij"
WRONG = "sk-lm-AbCdEf12:jihgfedcba9876543210"
SMALL = "qwen2-1.5b-instruct"
CHAT = {"messages": [{"role": "user", "content": "count to 3"}]}
Launch = Callable[..., Gateway]


@pytest.fixture(scope="module")
def guarded() -> Iterator[Simulator]:
    """A simulator that requires the API token."""
    simulator = Simulator(0, "--token", TOKEN)
    yield simulator
    simulator.stop()


@pytest.fixture
def authority(tmp_path: Path) -> trustme.CA:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return authority


@pytest.fixture
def encrypted(tmp_path: Path, authority: trustme.CA) -> Iterator[Simulator]:
    """A simulator with a certificate for ``localhost``, not for its address."""
    issued = authority.issue_cert("localhost")
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(str(key))
    simulator = Simulator(0, "--tls-cert", str(certificate), "--tls-key", str(key))
    simulator.url = f"https://localhost:{simulator.port}"
    simulator.http.verify = str(tmp_path / "ca.pem")
    yield simulator
    simulator.stop()


def assert_works(gateway: Gateway) -> None:
    """List, load and chat."""
    assert gateway.get("/admin/models").status_code == 200
    assert gateway.post("/admin/models/load", {"modelKey": SMALL}).status_code == 200
    response = gateway.post("/v1/chat/completions", CHAT)
    assert response.status_code == 200
    assert response.json()["choices"][0]["message"]["content"]


def test_the_api_token_is_accepted_by_http_and_websocket(
    launch: Launch, guarded: Simulator
) -> None:
    gateway = launch(guarded.url, LMSTUDIO_API_TOKEN=TOKEN)
    assert_works(gateway)
    assert set(guarded.state()["clients"]) == {"AbCdEf12"}
    assert gateway.get("/health").json()["status"] == "ok"


@pytest.mark.parametrize("token", [WRONG, None])
def test_a_wrong_or_missing_token_is_reported_in_plain_words(
    launch: Launch, guarded: Simulator, token: str | None
) -> None:
    gateway = launch(guarded.url, LMSTUDIO_API_TOKEN=token, SDK_RETRY_DELAY=2000)
    response = gateway.get("/admin/models")
    assert response.status_code == 502
    assert "LMSTUDIO_API_TOKEN" in response.json()["error"]
    inference = gateway.post("/v1/chat/completions", CHAT | {"model": SMALL})
    assert inference.status_code == 401
    for text in (response.text, inference.text, gateway.logged()):
        assert WRONG not in text
        assert WRONG.partition(":")[2] not in text
        assert "Traceback" not in text


def test_https_becomes_wss_and_the_certificate_is_verified(
    launch: Launch, encrypted: Simulator, tmp_path: Path
) -> None:
    gateway = launch(encrypted.url, SSL_CERT_FILE=tmp_path / "ca.pem")
    assert_works(gateway)
    assert {"llm", "system"} <= set(encrypted.state()["socketsOpened"])


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_an_untrusted_certificate_or_one_for_another_name_is_rejected(
    launch: Launch, encrypted: Simulator, tmp_path: Path, host: str
) -> None:
    # a trusted authority but another name, or the right name of an unknown authority
    authority = {"SSL_CERT_FILE": tmp_path / "ca.pem"} if host == "127.0.0.1" else {}
    gateway = launch(f"https://{host}:{encrypted.port}", SDK_RETRY_DELAY=10, **authority)
    assert gateway.get("/admin/models").status_code == 503
    response = gateway.post("/v1/chat/completions", CHAT | {"model": SMALL})
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "lmstudio_unreachable"
    assert encrypted.state()["socketsOpened"] == {}
    assert encrypted.requests() == []
    assert "Traceback" not in gateway.logged()


def test_proxies_in_the_environment_are_ignored(launch: Launch) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    names = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "WS_PROXY", "WSS_PROXY")
    proxies = {name: nowhere for upper in names for name in (upper, upper.lower())}
    assert_works(launch(**proxies))


def test_a_host_name_works_whatever_its_first_address_is(
    launch: Launch, simulator: Simulator
) -> None:
    assert_works(launch(f"http://localhost:{simulator.port}/v1/"))


def test_the_log_has_no_messages_of_the_sdk(launch: Launch, simulator: Simulator) -> None:
    gateway = launch(WEB_CONCURRENCY=1, SDK_RETRY_DELAY=10)
    assert_works(gateway)
    simulator.faults(drop_sockets=True)
    assert_works(gateway)
    assert gateway.post("/admin/models/load", {"modelKey": "no-such"}).status_code == 404
    assert gateway.post("/admin/models/load", {"modelKey": "deepseek-r1-671b"}).status_code == 502
    simulator.faults(drop_sockets=True, refuse_websockets=True)
    assert gateway.get("/admin/models").status_code == 503
    gateway.stop()
    eventually(lambda: gateway.process.poll() is not None)
    known = ("gateway.", "gunicorn.")
    lines = [line.split(" ", 3) for line in gateway.logged().splitlines()]
    assert [line for line in lines if len(line) < 4 or not line[2].startswith(known)] == []
