"""A real nginx in front of a gateway, with the configuration in ``deploy``."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from tests.processes import eventually, free_port

START_TIMEOUT = 10.0
DEPLOYED = Path(__file__).parents[1] / "deploy" / "nginx.conf"
#: Stands in for the system's nginx.conf, which includes deploy/nginx.conf.
_MAIN = """
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
    include {folder}/site.conf;
}}
"""


def require(binary: str) -> str:
    """The path of a program. Skips the test if it is not installed; in CI, fails it."""
    path = shutil.which(binary) or shutil.which(binary, path="/usr/sbin:/usr/local/sbin")
    if path is None:
        reason = f"{binary} is not installed"
        if os.environ.get("CI") == "true":
            pytest.fail(f"{reason}, but CI must run this test")
        pytest.skip(reason)
    return path


class Nginx:
    """nginx on a free port in front of ``upstream``: ``http://host:port`` or ``unix:/path``.

    ``changes`` are replacements in deploy/nginx.conf, in addition to those of its addresses.
    """

    def __init__(self, folder: Path, upstream: str, changes: dict[str, str] | None = None) -> None:
        self._binary = require("nginx")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "error.log"
        # started by root, nginx's workers would run as nobody, who can't read the folder
        user = "user root root;" if os.geteuid() == 0 else ""
        (folder / "nginx.conf").write_text(_MAIN.format(user=user, folder=folder))
        addresses = {
            "listen 80;": f"listen 127.0.0.1:{self.port};",
            "\n    server 127.0.0.1:8002;": f"\n    server {upstream.removeprefix('http://')};",
        }
        site = DEPLOYED.read_text()
        for old, new in {**addresses, **(changes or {})}.items():
            assert site.count(old) == 1, old
            site = site.replace(old, new)
        (folder / "site.conf").write_text(site)
        self.process = subprocess.Popen(self._command())
        eventually(self._answers, START_TIMEOUT)

    def configuration(self) -> str:
        """The whole configuration, as nginx has parsed it."""
        command = [*self._command(), "-T", "-q"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)

    def _command(self) -> list[str]:
        configuration = str(self.folder / "nginx.conf")
        return [self._binary, "-p", str(self.folder), "-c", configuration, "-e", str(self.log)]

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0
