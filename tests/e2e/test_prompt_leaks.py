"""LM Studio's errors may quote the request: the client gets them, nothing else does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

from tests.conftest import EventReader
from tests.processes import Gateway

MARKER = "walrus-prompt-marker-4711"
CHAT = {
    "model": "m" * 200 + MARKER,
    "messages": [{"role": "user", "content": MARKER, "name": MARKER}],
    "stop": [MARKER],
    "tools": [{"type": "function", "function": {"name": MARKER, "description": MARKER}}],
    "metadata": {MARKER: MARKER},
    MARKER: MARKER,
}
PATHS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"model": "m", "prompt": MARKER, "suffix": MARKER},
    "/v1/responses": {"model": "m", "input": MARKER, "instructions": MARKER},
    "/v1/messages": {"model": "m", "system": MARKER, "messages": [], "max_tokens": 5},
    "/v1/embeddings": {"model": "m", "input": [MARKER]},
    "/v1/audio/speech": {"model": "m", "input": MARKER},
}
#: Form → status, content type and content; ``%s`` is the request's body as a JSON string.
FORMS = {
    "string": (400, "application/json", '{"error": %s}'),
    "object": (400, "application/json", '{"error": {"message": %s, "code": %s, "param": %s}}'),
    "inside-200": (200, "application/json", '{"error": %s}'),
    "object-inside-200": (200, "application/json", '{"error": {"message": %s, "type": %s}}'),
    "html": (502, "text/html", "<html><h1>Unexpected token in: %s</h1></html>"),
    "text": (500, "text/plain", "Unexpected token in: %s"),
    "stream-data": (200, "text/event-stream", 'data: {"error": %s}\n\n'),
    "stream-event": (200, "text/event-stream", 'event: error\ndata: {"message": %s}\n\n'),
}


class Echo(BaseHTTPRequestHandler):
    """An LM Studio whose every response is an error that quotes the whole request."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        quoted = json.dumps(f"Unexpected token in: {self.path} {self.headers} {body}")
        status, kind, content = FORMS[self.headers["X-Form"]]
        content = content.replace("%s", quoted)
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content.encode())))
        self.end_headers()
        self.wfile.write(content.encode())

    def log_message(self, *args: Any) -> None:
        """Log nothing."""


@pytest.fixture
def echo() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_prompt_reaches_neither_events_nor_log_nor_state_nor_metrics(
    echo: str,
    launch: Callable[..., Gateway],
    listen: Callable[..., EventReader],
    form: str,
) -> None:
    gateway = launch(echo, LOG_LEVEL="debug", LOG_FORMAT=form)
    reader = listen(gateway)
    count = 0
    for path, content in PATHS.items():
        for name in FORMS:
            for stream in (False, True):
                response = gateway.http.post(
                    f"{gateway.url}{path}?key={MARKER}",
                    json={**content, "stream": stream},
                    headers={"X-Form": name, "X-Other": MARKER, "Cookie": MARKER},
                    timeout=20,
                )
                count += 1
                assert MARKER in response.text  # the client gets LM Studio's own words
        for corrupted in (f'{{"a": "{MARKER}', f'["{MARKER}"]', f'{{"{MARKER}": {MARKER}}}'):
            gateway.http.post(gateway.url + path, data=corrupted, headers={"X-Form": "string"})
            count += 1
    reader.until("inference_complete", count)
    written = {path: gateway.get(path).text for path in ("/debug/status", "/metrics")}
    written["performance"] = gateway.get("/debug/metrics").text
    gateway.stop()
    written["log"] = gateway.logged()
    # the log of all events is in the state
    written["state"] = "".join(
        path.read_bytes().decode("latin-1") for path in gateway.folder.glob("state.db*")
    )
    assert "Unexpected token" in written["log"]
    assert "LM Studio responded with an error" in written["state"]
    for origin, text in written.items():
        at = text.find(MARKER)
        assert at < 0, f"{origin}: {text[max(0, at - 300) : at + 100]}"
