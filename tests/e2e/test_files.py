"""The files of a running gateway: who may read them, whatever the umask."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.test_admission import ask
from tests.processes import Gateway

pytestmark = pytest.mark.both_servers


@pytest.fixture(params=[0o000, 0o077], ids=["umask 000", "umask 077"])
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


def mode(path: Path | str) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


@pytest.mark.usefixtures("umask")
def test_the_state_is_private_and_the_unix_socket_open_to_the_group(
    launch: Callable[..., Gateway], tmp_path: Path
) -> None:
    # the path of a Unix socket must be short, which pytest's folders are not
    with tempfile.TemporaryDirectory() as folder:
        state = tmp_path / "state"
        state.mkdir()
        (state / "state.db").touch(0o644)
        gateway = launch(GATEWAY_HOST=f"unix:{folder}/s", STATE_URL=f"sqlite:///{state}/state.db")
        assert ask(gateway, "POST", "/admin/models/deactivate")[0] == 200
        found = {file.name: mode(file) for file in state.iterdir()}
        assert {"state.db", "state.db-wal", "state.db-shm", "state.db-shared"} <= set(found)
        assert set(found.values()) == {0o600}, found
        assert mode(gateway.unix) == 0o660
        gateway.stop()


@pytest.mark.parametrize(("permissions", "warnings"), [(0o644, 1), (0o600, 0)])
def test_a_dotenv_that_others_can_read_is_reported_once_at_the_start(
    launch: Callable[..., Gateway], tmp_path: Path, permissions: int, warnings: int
) -> None:
    file = tmp_path / "gateway-0" / ".env"
    file.parent.mkdir()
    file.write_text("GATEWAY_API_KEY=hunter2-hunter2-hunter2\n")
    file.chmod(permissions)
    log = launch().logged()
    assert log.count("chmod 600 .env") == warnings, log
    assert "hunter2" not in log
