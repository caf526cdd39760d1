"""Shared by the scripts: the chats that they send, and the resources that the gateway uses."""

from __future__ import annotations

import resource
from typing import Any

import psutil

from tests.processes import Gateway

MODEL = "qwen2-1.5b-instruct"
EMBEDDING = "text-embedding-nomic-embed-text-v1.5"
CHAT = "/v1/chat/completions"


def chat(count: int, stream: bool, **more: Any) -> dict[str, Any]:
    """A chat whose response counts to ``count``."""
    messages = [{"role": "user", "content": f"count to {count}"}]
    return {"model": MODEL, "messages": messages, "stream": stream, **more}


def allow_many_files() -> None:
    """Raise the limit of open files to the maximum; child processes inherit it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def memory(gateway: Gateway) -> tuple[float, float]:
    """RSS and PSS of all processes of the gateway together, in MiB."""
    main = psutil.Process(gateway.process.pid)
    found = [one.memory_full_info() for one in [main, *main.children(recursive=True)]]
    return sum(one.rss for one in found) / 2**20, sum(one.pss for one in found) / 2**20


def descriptors(gateway: Gateway) -> tuple[list[int], list[int]]:
    """The numbers of open files and of TCP connections of each worker."""
    workers = [psutil.Process(pid) for pid in gateway.workers()]
    sockets = [
        [one for one in worker.net_connections("tcp") if one.status != psutil.CONN_LISTEN]
        for worker in workers
    ]
    return [worker.num_fds() for worker in workers], [len(one) for one in sockets]
