"""The targets of the measurements: the upstream, the gateway, nginx, and any other proxy."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import psutil

from tests.processes import free_port

KEY = "bench-key-0123456789"
MODEL = "bench-model"
CHAT = "/v1/chat/completions"
#: The upstream's response to a plain request; below, an event of its fast streams.
RESPONSE = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "model": MODEL,
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "The quick brown fox. " * 12},
            "finish_reason": "stop",
        }
    ],
    "usage": {"prompt_tokens": 20, "completion_tokens": 60, "total_tokens": 80},
}
EVENTS_PER_STREAM = 2000
_EVENT = {
    "id": "chatcmpl-1",
    "object": "chat.completion.chunk",
    "model": MODEL,
    "choices": [{"index": 0, "delta": {"content": " word"}, "finish_reason": None}],
}
_UPSTREAM = """
daemon off; worker_processes 1; pid {folder}/upstream.pid; {user}
error_log {folder}/upstream.log crit;
events {{ worker_connections 8192; }}
http {{
    access_log off; keepalive_requests 1000000000; keepalive_timeout 5; tcp_nodelay on;
    client_max_body_size 0; client_body_buffer_size 2m; client_body_temp_path {folder}/u-body;
    proxy_temp_path {folder}/u-proxy;
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            default_type application/json;
            if ($http_x_bench = "fast") {{ rewrite ^ /fast.txt last; }}
            if ($http_x_bench ~ "^paced") {{ rewrite ^ /paced last; }}
            return 200 '{response}';
        }}
        location = /fast.txt {{
            root {folder}; default_type text/event-stream; types {{ }} error_page 405 =200 $uri;
        }}
        location = /paced {{
            proxy_pass http://127.0.0.1:{paced}; proxy_buffering off; proxy_http_version 1.1;
            proxy_read_timeout 600s;
        }}
    }}
}}
"""
_NGINX = """
daemon off; worker_processes 2; pid {folder}/front.pid; {user}
error_log {folder}/front.log crit;
events {{ worker_connections 8192; }}
http {{
    access_log off; keepalive_requests 1000000000; client_max_body_size 0;
    client_body_temp_path {folder}/f-body; proxy_temp_path {folder}/f-proxy;
    upstream lmstudio {{ server 127.0.0.1:{upstream}; keepalive 256; }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            proxy_pass http://lmstudio; proxy_http_version 1.1; proxy_set_header Connection "";
            proxy_buffering off; proxy_read_timeout 600s;
        }}
    }}
}}
"""


class Process:
    """A process and all its descendants."""

    def __init__(self, command: list[str], log: Path, **environ: str) -> None:
        self.started = time.monotonic()
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                command, env={**os.environ, **environ}, stdout=out, stderr=out, cwd=log.parent
            )

    def cpu_seconds(self) -> float:
        """CPU time of all their threads in seconds, exact to the nanosecond."""
        total = 0
        for process in self._family():
            for schedstat in Path(f"/proc/{process.pid}/task").glob("*/schedstat"):
                with suppress(OSError):
                    total += int(schedstat.read_text().split()[0])
        return total / 1e9

    def pss_mib(self) -> float:
        """Their proportional set size in MiB."""
        found = 0
        for process in self._family():
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
            found += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        return found / 1024

    def stop(self) -> None:
        family = self._family()
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(family, 5)
        for process in alive:
            process.kill()

    def _family(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self._process.pid)
            return [parent, *parent.children(recursive=True)]
        return []


class Target:
    """A server that responds like the upstream; ``process`` None: its CPU time is not measured."""

    def __init__(self, name: str, port: int, process: Process | None) -> None:
        self.name, self.port, self.process = name, port, process
        self.url = f"http://127.0.0.1:{port}{CHAT}"

    def wait(self, timeout: float = 60) -> None:
        """Wait until it serves; SystemExit if it does not."""
        deadline = time.monotonic() + timeout
        body = json.dumps({"messages": []}).encode()
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        while True:
            with suppress(OSError, urllib.error.URLError):
                request = urllib.request.Request(self.url, body, headers)
                if b"chat.completion" in urllib.request.urlopen(request, timeout=2).read():
                    return
            if time.monotonic() > deadline:
                raise SystemExit(f"{self.name} does not serve")
            time.sleep(0.02)


class Testbed:
    """All targets of one run, with their files in one folder. Call :meth:`stop` at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._processes: list[Process] = []
        self._nginx = shutil.which("nginx") or "/usr/sbin/nginx"
        self._user = "user root;" if os.geteuid() == 0 else ""
        event = f"data: {json.dumps(_EVENT)}\n\n"
        (folder / "fast.txt").write_text(event * EVENTS_PER_STREAM + "data: [DONE]\n\n")
        self.paced_port = free_port()
        self._start("paced", [sys.executable, "-m", "benchmarks.paced", str(self.paced_port)])
        self.upstream = self._start_nginx(
            "upstream", _UPSTREAM, response=json.dumps(RESPONSE), paced=self.paced_port
        )

    def nginx(self) -> Target:
        """nginx, configured for streams, with two workers; it only passes on bytes."""
        return self._start_nginx("nginx", _NGINX, upstream=self.upstream.port)

    def gateway(self, name: str = "gateway", **settings: str) -> Target:
        """The gateway with everything enabled: keys, allowlist, injection, events, metrics, log."""
        port = free_port()
        environ = {
            "LMSTUDIO_BASE_URL": f"http://127.0.0.1:{self.upstream.port}",
            "GATEWAY_PORT": str(port),
            "GATEWAY_API_KEY": KEY,
            "IP_ALLOWLIST": "127.0.0.0/8",
            "STATE_URL": f"sqlite:///{self.folder}/{name}.db",
            "WEB_CONCURRENCY": "2",
            **settings,
        }
        command = [sys.executable, "-m", "gateway", "serve"]
        process = self._start(name, command, **environ)
        target = Target(name, port, process)
        self._activate(port)
        target.wait()
        return target

    def command(self, name: str, command: str) -> Target:
        """Another proxy; fills in ``{port}``, ``{upstream}`` and ``{key}`` in its command."""
        port = free_port()
        upstream = f"http://127.0.0.1:{self.upstream.port}"
        words = shlex.split(command.format(port=port, upstream=upstream, key=KEY))
        environ = {"PORT": str(port), "UPSTREAM": upstream, "KEY": KEY}
        target = Target(name, port, self._start(name, words, **environ))
        target.wait()
        return target

    def remove(self, target: Target) -> None:
        """Stop one target before the others."""
        if target.process is not None:
            self._processes.remove(target.process)
            target.process.stop()

    def stop(self) -> None:
        for process in self._processes:
            process.stop()

    def _start(self, name: str, command: list[str], **environ: str) -> Process:
        root = str(Path(__file__).parents[1])
        process = Process(command, self.folder / f"{name}.out", PYTHONPATH=root, **environ)
        self._processes.append(process)
        return process

    def _start_nginx(self, name: str, configuration: str, **values: object) -> Target:
        port = free_port()
        path = self.folder / f"{name}.conf"
        filled = configuration.format(folder=self.folder, port=port, user=self._user, **values)
        path.write_text(filled)
        process = self._start(name, [self._nginx, "-p", str(self.folder), "-c", str(path)])
        target = Target(name, port, process)
        target.wait()
        return target

    def _activate(self, port: int) -> None:
        body = {"modelKey": MODEL, "defaultInference": {"temperature": 0.5, "maxTokens": 100}}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/admin/models/activate",
            json.dumps(body).encode(),
            {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"},
        )
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(request, timeout=60).read()
                return
            except urllib.error.HTTPError as error:
                raise SystemExit(f"activate: {error.read().decode()}") from None
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
