"""Where no key is required, web pages of other origins can do nothing, also in a real Chromium."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.browser import TIMEOUT, chromium
from tests.e2e.test_admission import ADMIN, NEW, SURFACES, Launch, ask, bearer, check_dialect
from tests.processes import Gateway, Simulator, eventually

MODEL, OTHER = "qwen2-1.5b-instruct", "qwen2.5-7b-instruct"
ACTIVATE = "/admin/models/activate"
BODY = json.dumps({"modelKey": MODEL}).encode()
JSON = {"Content-Type": "application/json"}
FOREIGN = {"Origin": "https://evil.example"}
ALLOWED = "app://obsidian.md"


def active(gateway: Gateway) -> Any:
    return gateway.get("/admin/models").json()["active"]


@pytest.mark.both_servers
@pytest.mark.parametrize("path", SURFACES)
def test_a_foreign_origin_or_host_gets_403_in_the_dialect_of_the_path(
    gateway: Gateway, simulator: Simulator, path: str
) -> None:
    for headers, code in (
        (FOREIGN, "origin_not_allowed"),
        ({"Origin": "null"}, "origin_not_allowed"),
        ({"Sec-Fetch-Site": "cross-site"}, "origin_not_allowed"),
        ({"Host": "evil.example"}, "host_not_allowed"),
    ):
        for method in ("GET", "POST"):
            status, head, content = ask(gateway, method, path, headers)
            assert (status, head["Access-Control-Allow-Origin"]) == (403, None)
            check_dialect(SURFACES[path], content, code)
        preflight = {"Access-Control-Request-Method": "POST", **headers}
        status, _, content = ask(gateway, "OPTIONS", path, preflight)
        assert status == 403
        check_dialect(SURFACES[path], content, code)
    assert simulator.requests() == []


@pytest.mark.both_servers
def test_only_the_gateways_own_pages_activate_a_model(gateway: Gateway) -> None:
    text = {"Content-Type": "text/plain"}
    assert ask(gateway, "POST", ACTIVATE, FOREIGN | text, BODY)[0] == 403
    assert ask(gateway, "POST", ACTIVATE, FOREIGN | JSON, BODY)[0] == 403
    status, _, content = ask(gateway, "POST", ACTIVATE, text, BODY)
    assert status == 415
    check_dialect("admin", content, "unsupported_media_type")
    assert active(gateway) is None
    own = {"Origin": gateway.url, "Sec-Fetch-Site": "same-origin"}
    assert ask(gateway, "POST", ACTIVATE, own | JSON, BODY)[0] == 200
    assert active(gateway)["modelKey"] == MODEL
    assert ask(gateway, "POST", "/admin/models/deactivate", own)[0] == 200
    assert active(gateway) is None


@pytest.mark.both_servers
def test_an_allowed_origin_uses_a_keyless_gateway(launch: Launch) -> None:
    gateway = launch(CORS_ORIGINS=f"{ALLOWED},http://localhost:*", WEB_CONCURRENCY=1)
    for origin in (ALLOWED, "http://localhost:5173"):
        headers = {"Origin": origin, "Sec-Fetch-Site": "cross-site"}
        preflight = {"Access-Control-Request-Method": "POST", **headers}
        assert ask(gateway, "OPTIONS", ACTIVATE, preflight)[0] == 204
        status, head, _ = ask(gateway, "POST", ACTIVATE, headers | JSON, BODY)
        assert (status, head["Access-Control-Allow-Origin"]) == (200, origin)
    assert ask(gateway, "POST", ACTIVATE, FOREIGN | JSON, BODY)[0] == 403


def test_an_admin_key_alone_leaves_inference_to_the_gateways_own_pages(launch: Launch) -> None:
    gateway = launch(GATEWAY_ADMIN_KEY=ADMIN, WEB_CONCURRENCY=1)
    assert ask(gateway, "GET", "/v1/models", FOREIGN)[0] == 403
    assert ask(gateway, "GET", "/v1/models", {"Host": "evil.example"})[0] == 403
    assert ask(gateway, "GET", "/v1/models")[0] == 200
    assert ask(gateway, "POST", ACTIVATE, FOREIGN)[0] == 401


def test_where_keys_are_set_every_origin_may_be_allowed(launch: Launch) -> None:
    gateway = launch(GATEWAY_API_KEY=NEW, CORS_ORIGINS="*", WEB_CONCURRENCY=1)
    for origin in ("https://anything.example", "null"):
        status, head, _ = ask(gateway, "GET", "/v1/models", {"Origin": origin, **bearer(NEW)})
        assert (status, head["Access-Control-Allow-Origin"]) == (200, origin)
        assert ask(gateway, "GET", "/v1/models", {"Origin": origin})[0] == 401


# In a browser

#: Posts to the gateway in every way that a page can, then shows each outcome.
_PAGE = """<!doctype html><title>running</title>
<iframe name=frame></iframe>
<form method=post enctype=text/plain target=frame action="GATEWAY/admin/models/activate">
<input name='{"modelKey":"qwen2-1.5b-instruct","instanceId":"' value='"}'></form>
<script>
const url = "GATEWAY/admin/models/activate";
const body = JSON.stringify({ modelKey: "qwen2-1.5b-instruct" });
const json = { "Content-Type": "application/json" };
const post = (options) => fetch(url, { method: "POST", body, ...options })
    .then((response) => response.type, (error) => error.name);
const form = new Promise((done) => {
  document.querySelector("iframe").onload = () => done("sent");
  document.forms[0].submit();
});
const bodiless = fetch("GATEWAY/admin/models/deactivate", { method: "POST", mode: "no-cors" })
    .then((response) => response.type);
Promise.all([post({ mode: "no-cors" }), post({}), post({ headers: json }), bodiless, form])
    .then((outcomes) => document.title = "done: " + outcomes);
</script>"""


@pytest.fixture
def page_url(gateway: Gateway) -> Iterator[str]:
    """The address of a page that attacks the gateway, but for its host."""
    content = _PAGE.replace("GATEWAY", gateway.url).encode()

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f":{server.server_address[1]}/"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_page_of_another_origin_fails_to_activate_or_deactivate_a_model(
    gateway: Gateway, page_url: str, tmp_path: Path
) -> None:
    assert gateway.post(ACTIVATE, {"modelKey": OTHER}).status_code == 200
    driver = chromium(tmp_path)
    try:
        # one page of another site, and one of the same site with another port
        for host in ("localhost", "127.0.0.1"):
            driver.get(f"http://{host}{page_url}")
            title = eventually(lambda: driver.title.startswith("done") and driver.title, TIMEOUT)
            assert title == "done: opaque,TypeError,TypeError,opaque,sent"
            assert active(gateway)["modelKey"] == OTHER
        # the same browser is admitted from the gateway's own page
        driver.get(f"{gateway.url}/debug/")
        status = driver.execute_async_script(
            "const [url, body, done] = arguments;"
            "fetch(url, {method: 'POST', body, headers: {'Content-Type': 'application/json'}})"
            ".then((response) => done(response.status), (error) => done(error.name))",
            ACTIVATE,
            BODY.decode(),
        )
        assert status == 200
        assert active(gateway)["modelKey"] == MODEL
    finally:
        driver.quit()
