"""A real nginx as the front of a gateway, configured as an operator would for streams."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from tests.processes import eventually, free_port

START_TIMEOUT = 10.0

_CONFIGURATION = """
daemon off;
{user}
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log warn;
events {{ worker_connections 2048; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen {listen};
        client_max_body_size 0;
        location / {{
            proxy_pass {upstream};
            proxy_http_version 1.1;
            proxy_buffering off;
            proxy_request_buffering off;
            proxy_read_timeout 3600s;
            proxy_set_header Connection "";
            proxy_set_header Host $http_host;
            proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
            proxy_set_header X-Forwarded-Proto $scheme;
        }}
    }}
}}
"""


def require(binary: str) -> str:
    """The path of a program; without it the test is skipped, but fails in CI."""
    path = shutil.which(binary) or shutil.which(binary, path="/usr/sbin:/usr/local/sbin")
    if path is None:
        reason = f"{binary} is not installed"
        if os.environ.get("CI") == "true":
            pytest.fail(f"{reason}, and CI must not skip this")
        pytest.skip(reason)
    return path


class Nginx:
    """nginx in front of ``upstream``: ``http://host:port`` or ``unix:/path``.

    It listens on a free port, or on the Unix socket ``listen``. ``url`` is for TCP.
    """

    def __init__(self, folder: Path, upstream: str, listen: str | None = None) -> None:
        binary = require("nginx")
        folder.mkdir(parents=True, exist_ok=True)
        self.unix = (listen or "").removeprefix("unix:")
        self.port = 0 if self.unix else free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "error.log"
        configuration = folder / "nginx.conf"
        configuration.write_text(
            _CONFIGURATION.format(
                # as root nginx's workers would otherwise be nobody, who can't enter the folder
                user="user root root;" if os.geteuid() == 0 else "",
                folder=folder,
                listen=listen or f"127.0.0.1:{self.port}",
                upstream=f"http://{upstream}" if upstream.startswith("unix:") else upstream,
            )
        )
        command = [binary, "-p", str(folder), "-c", str(configuration), "-e", str(self.log)]
        self.process = subprocess.Popen(command)
        eventually(self._answers, START_TIMEOUT)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        family = socket.AF_UNIX if self.unix else socket.AF_INET
        address = self.unix or ("127.0.0.1", self.port)
        with socket.socket(family) as probe:
            return probe.connect_ex(address) == 0
