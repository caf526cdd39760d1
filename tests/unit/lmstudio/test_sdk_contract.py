"""The SDK has the private names that the gateway uses: if a release moves one, a test fails."""

from __future__ import annotations

import configparser
import inspect
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import lmstudio
import pytest
from lmstudio import _ws_impl, _ws_thread, json_api, sync_api

from gateway.lmstudio import sdk
from gateway.lmstudio.sdk import NOISY_LOGGERS

ROOT = Path(__file__).parents[3]


@pytest.fixture
def llm() -> Iterator[Any]:
    """An LLM session of a client that is not connected."""
    with closing(lmstudio.Client("127.0.0.1:9")) as client:
        yield client.llm


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_the_installed_sdk_is_the_pinned_version() -> None:
    assert lmstudio.__version__ == "1.5.0"
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert "lmstudio==1.5.0" in config["options"]["install_requires"].split()
    assert "lmstudio==1.5.0" in (ROOT / "requirements.txt").read_text().split()


def test_only_the_modules_of_the_link_use_the_sdk() -> None:
    users = [
        path.name
        for path in (ROOT / "gateway").rglob("*.py")
        if re.search(r"^\s*(import|from) lmstudio\b", path.read_text(), re.MULTILINE)
    ]
    assert sorted(users) == ["loading.py", "sdk.py", "sessions.py"]


def test_the_bridge_has_the_signatures_and_properties_in_use() -> None:
    bridge = _ws_thread.SyncToAsyncWebsocketBridge
    assert parameters(bridge) == ["ws_thread", "ws_url", "auth_details", "log_context"]
    assert parameters(bridge.connect) == parameters(bridge.disconnect) == ["self"]
    for name in ("_connection_failure", "_auth_failure", "_ws"):
        assert isinstance(inspect.getattr_static(bridge, name), property)


def test_the_handler_has_what_our_subclass_overrides() -> None:
    handler = _ws_impl.AsyncWebsocketHandler
    expected = ["self", "task_manager", "ws_url", "auth_details", "log_context"]
    assert parameters(handler)[-4:] == expected[-4:]
    assert parameters(handler._receive_messages) == ["self"]
    assert parameters(handler._enqueue_message) == ["self", "message"]
    assert parameters(handler.send_json) == ["self", "message"]
    assert "await self._receive_messages()" in inspect.getsource(handler._handle_ws)
    assert "self._enqueue_message(message)" in inspect.getsource(handler._process_next_message)
    bridge = inspect.getsource(_ws_thread.SyncToAsyncWebsocketBridge.__init__)
    assert "self._ws_handler = AsyncWebsocketHandler(" in bridge


def test_the_websocket_has_what_our_subclass_overrides() -> None:
    websocket = sync_api.SyncLMStudioWebsocket
    assert parameters(websocket) == ["ws_thread", "ws_url", "auth_details", "log_context"]
    assert isinstance(inspect.getattr_static(websocket, "_httpx_ws"), property)
    source = inspect.getsource(websocket.connect)
    for name in ("self._ws_thread", "self._ws_url", "self._auth_details", "self._ws = "):
        assert name in source
    assert "self._logger.event_context" in source


def test_a_client_has_the_private_attributes_in_use() -> None:
    with closing(lmstudio.Client("127.0.0.1:9")) as client:
        assert isinstance(client._ws_thread, _ws_thread.AsyncWebsocketThread)
        assert isinstance(client._auth_details, dict)
        for namespace in ("llm", "embedding", "system"):
            session = getattr(client, namespace)
            assert session._lmsws is None
            assert callable(session._resources.enter_context)
            assert callable(session.disconnect)


def test_the_authentication_message_is_created_by_the_method_we_override() -> None:
    class Client(lmstudio.Client):
        def _create_auth_message(self) -> Any:
            return self._format_auth_message("identifier", "passkey")

    with closing(Client("127.0.0.1:9")) as client:
        assert client._auth_details == {
            "authVersion": 1,
            "clientIdentifier": "identifier",
            "clientPasskey": "passkey",
        }
        guest = client._format_auth_message("guest:abc")
        assert guest["clientIdentifier"] == "guest:abc"


def test_remote_calls_and_channels_have_the_signatures_in_use(llm: Any) -> None:
    assert parameters(llm.remote_call)[:2] == ["endpoint", "params"]
    assert "params.to_dict()" in inspect.getsource(sync_api) + inspect.getsource(json_api)
    assert parameters(llm._create_channel) == ["endpoint"]
    channel = sync_api.SyncChannel
    assert callable(channel.cancel)
    assert callable(channel.wait_for_result)
    assert "self._timeout" in inspect.getsource(channel.__init__)


@pytest.mark.parametrize("namespace", ["llm", "embedding"])
def test_a_load_endpoint_has_a_list_for_the_load_fields(namespace: str) -> None:
    with closing(lmstudio.Client("127.0.0.1:9")) as client:
        types = getattr(client, namespace)._API_TYPES
        endpoint: Any = json_api.LoadModelEndpoint(
            "model-key",
            "identifier",
            None,
            types.REQUEST_NEW_INSTANCE,
            types.MODEL_LOAD_CONFIG,
            None,
            lambda fraction: None,
        )
    assert endpoint.is_finished is False
    created = endpoint.creation_params
    assert created["modelKey"] == "model-key"
    assert created["identifier"] == "identifier"
    assert created.get("ttlMs") is None
    layer = created["loadConfigStack"]["layers"][0]
    assert layer["layerName"] == "apiOverride"
    assert isinstance(layer["config"]["fields"], list)


def test_a_ttl_is_in_seconds_and_none_means_no_ttl() -> None:
    with closing(lmstudio.Client("127.0.0.1:9")) as client:
        types: Any = client.llm._API_TYPES

    def ttl_ms(seconds: int | None) -> Any:
        endpoint: Any = json_api.LoadModelEndpoint(
            "m", None, seconds, types.REQUEST_NEW_INSTANCE, types.MODEL_LOAD_CONFIG, None, None
        )
        return endpoint.creation_params.get("ttlMs")

    assert ttl_ms(60) == 60_000
    assert ttl_ms(None) is None


def test_the_errors_are_those_that_the_link_converts() -> None:
    error = json_api.LMStudioServerError("text", {"title": "title", "displayData": {"code": "x"}})
    assert error._raw_error is not None
    assert error._raw_error["title"] == "title"
    for name in ("LMStudioWebsocketError", "LMStudioTimeoutError", "LMStudioServerError"):
        assert issubclass(getattr(lmstudio, name), lmstudio.LMStudioError)
    assert parameters(lmstudio.set_sync_api_timeout) == ["timeout"]


def test_the_sdk_logs_under_the_names_that_are_silenced() -> None:
    for name in NOISY_LOGGERS:
        if name[0].isupper():
            # the gateway's own subclass logs under its own name
            owner = next(
                getattr(module, name)
                for module in (_ws_thread, sync_api, sdk)
                if hasattr(module, name)
            )
            assert owner.__name__ == name
    assert "new_logger(type(self).__name__)" in inspect.getsource(_ws_thread)
