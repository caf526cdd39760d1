"""The SDK's remote calls, and the schemas that their parameters must fit.

Shapes follow ``lmstudio/_sdk_models`` (1.5.0); ``estimateModelUsage`` is only called by newer SDKs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from gateway.simulator.catalogue import MODELS, UNFAMILIAR_MODELS, JsonObject
from gateway.simulator.memory import Instance, LoadRequest, Refusal, resolve
from gateway.simulator.state import Simulator


class Violation(Exception):
    """A frame that LM Studio's schemas don't accept: it only warns about those."""


class Calls:
    """The calls of one namespace."""

    def __init__(self, simulator: Simulator, namespace: str) -> None:
        self._simulator = simulator
        self._namespace = namespace

    def endpoints(self) -> dict[str, Callable[[Any], Any]]:
        """Return name → call taking the ``parameter`` and returning the ``result``, if any."""
        if self._namespace == "system":
            return {"listDownloadedModels": self._list_downloaded, "version": self._version}
        if self._namespace not in ("llm", "embedding"):
            return {}
        endpoints: dict[str, Callable[[Any], Any]] = {
            "listLoaded": self._list_loaded,
            "getModelInfo": self._model_info,
            "getLoadConfig": self._load_config,
            "unloadModel": self._unload,
            "estimateModelUsage": self._estimate,
        }
        if self._namespace == "embedding":
            del endpoints["estimateModelUsage"]
        return endpoints

    def _list_downloaded(self, parameter: Any) -> list[JsonObject]:
        _expect(parameter is None, parameter)
        strange = UNFAMILIAR_MODELS if self._simulator.faults.switches.unknown_model_type else []
        return [model.info() for model in MODELS.values()] + strange

    def _version(self, parameter: Any) -> JsonObject:
        _expect(parameter is None, parameter)
        return {"version": "0.3.31", "build": 1}

    def _list_loaded(self, parameter: Any) -> list[JsonObject]:
        _expect(parameter is None, parameter)
        return [instance.info() for instance in self._simulator.memory.of(self._namespace)]

    def _model_info(self, parameter: Any) -> JsonObject | None:
        try:
            return self._specified(parameter).info()
        except Refusal:
            if parameter.get("throwIfNotFound"):
                raise
            return None

    def _load_config(self, parameter: Any) -> JsonObject:
        config = self._specified(parameter).config
        return {"fields": [{"key": key, "value": value} for key, value in config.items()]}

    def _unload(self, parameter: Any) -> None:
        _expect(isinstance(parameter, dict), parameter)
        identifier = parameter.get("identifier")
        _expect(isinstance(identifier, str), parameter)
        self._simulator.memory.unload(self._namespace, identifier)

    def _estimate(self, parameter: Any) -> JsonObject:
        """Answer as newer LM Studios do; the sizes are bytes and only roughly plausible."""
        model = resolve(self._namespace, self.load_request(parameter).model_key)
        context = model.size_bytes // 10
        return {
            "memory": {
                "confidence": "low",
                "modelVramBytes": model.size_bytes,
                "contextVramBytes": context,
                "totalVramBytes": model.size_bytes + context,
                "modelBytes": model.size_bytes,
                "contextBytes": context,
                "totalBytes": model.size_bytes + context,
            },
            "passesGuardrails": model.shortage is None,
        }

    def _specified(self, parameter: Any) -> Instance:
        """Find the loaded instance that a ``{specifier}`` parameter means."""
        loaded = self._simulator.memory.of(self._namespace)
        match parameter:
            case {"specifier": {"type": "instanceReference", "instanceReference": str(reference)}}:
                for instance in loaded:
                    if instance.reference == reference:
                        return instance
                raise Refusal("The model was unloaded", code="generic.specificModelUnloaded")
            case {"specifier": {"type": "query", "query": dict(query)}}:
                for instance in loaded:
                    if _matches(instance, query):
                        return instance
                raise self._simulator.memory.not_found(
                    self._namespace, "generic.noModelMatchingQuery", query=query
                )
        raise Violation(f"invalid parameter: {json.dumps(parameter)}")

    def load_request(self, parameter: Any, key: str = "modelKey") -> LoadRequest:
        """Check a load's parameter against LM Studio's schema; a TTL is whole ms, at least 1."""
        match parameter:
            case {"loadConfigStack": {"layers": list(layers)}} if isinstance(
                parameter.get(key), str
            ):
                pass
            case _:
                raise Violation(f"invalid parameter: {json.dumps(parameter)}")
        loads_new = key == "modelKey"
        identifier = parameter.get("identifier") if loads_new else None
        ttl = parameter.get("ttlMs" if loads_new else "loadTtlMs")
        _expect(identifier is None or isinstance(identifier, str), parameter)
        _expect(ttl is None or (type(ttl) is int and ttl >= 1), parameter)
        return LoadRequest(self._namespace, parameter[key], _fields(layers), identifier, ttl)


def _fields(layers: list[Any]) -> list[tuple[str, Any]]:
    """Return the key-value pairs of all layers, in order."""
    try:
        return [
            (str(entry["key"]), entry.get("value"))
            for layer in layers
            for entry in layer["config"]["fields"]
        ]
    except (KeyError, TypeError, AttributeError):
        raise Violation(f"invalid load configuration: {json.dumps(layers)}") from None


def _matches(instance: Instance, query: JsonObject) -> bool:
    info = instance.info()
    domain = query.get("domain")
    return domain in (None, instance.model.type) and all(
        info.get(name) == query[name]
        for name in ("identifier", "path", "vision")
        if query.get(name) is not None
    )


def _expect(condition: bool, parameter: Any) -> None:
    if not condition:
        raise Violation(f"invalid parameter: {json.dumps(parameter)}")
