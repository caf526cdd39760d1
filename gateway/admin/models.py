"""Lists, loads, unloads and activates models. It knows nothing of HTTP.

Each operation reports its events through ``emit(event, data)``; README.rst lists their types.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from gateway.errors import BadGateway, Conflict, GatewayError, NotFound, without_quotes
from gateway.lmstudio import Link, ServerRefused
from gateway.lmstudio import load_config as loadconfig
from gateway.state import Active, SharedStore

Emit = Callable[[str, dict[str, Any]], None]
Model = dict[str, Any]

TYPES = ("llm", "embedding")

#: LM Studio's codes for an unknown model, and for a name under which nothing is loaded.
UNKNOWN_MODEL = {"generic.pathNotFound", "generic.noModelMatchingQuery"}
NOT_LOADED = {
    "generic.identifierNotFound",
    "generic.noModelMatchingQuery",
    "generic.specificModelUnloaded",
}


class Models:
    """Model management over one link and one store."""

    def __init__(self, link: Link, store: SharedStore) -> None:
        self._link = link
        self._store = store

    # Listing ----------------------------------------------------------------------------------

    def listing(self) -> dict[str, Any]:
        """``{"loaded": [...], "downloaded": [...], "active": {...} or None}``."""
        loaded = self._loaded()
        downloaded = [_describe(model) for model in self._link.downloaded()]
        return {
            "loaded": [_describe_instance(model) for _, model in loaded],
            "downloaded": downloaded,
            "active": self._describe_active([model for _, model in loaded]),
        }

    # Loading ----------------------------------------------------------------------------------

    def load(self, wanted: dict[str, Any], emit: Emit) -> dict[str, Any]:
        """Load the model that a validated LoadSchema body names; returns the response body.

        Killing the greenlet cancels the load in LM Studio.
        """
        started = time.monotonic()
        emit("model_load_start", _load_names(wanted) | {"loadConfig": _config(wanted)})
        try:
            result = self._load(wanted, emit, started)
        except GatewayError as error:
            emit("error", _failed("model_load", error.message, started))
            raise
        except BaseException:
            emit("error", _failed("model_load", "cancelled", started))
            raise
        complete = ("modelKey", "instanceId", "activated", "totalTimeMs")
        emit(
            "model_load_complete",
            {name: result[name] for name in complete} | {"loadConfig": _config(wanted)},
        )
        return result

    def _load(self, wanted: dict[str, Any], emit: Emit, started: float) -> dict[str, Any]:
        key = wanted["modelKey"]
        model_type = self._type_of(key)
        if model_type is None:
            raise NotFound(f"Model not found: {key}")
        self._reject_taken(wanted.get("instanceId"))
        config = _config(wanted)
        kv_fields, warnings = loadconfig.to_kv(config, model_type)
        identifier = self._load_in_lmstudio(wanted, model_type, kv_fields, emit)
        applied, differing = self._read_back(model_type, identifier, config, kv_fields)
        activated = bool(wanted.get("activate", True))
        if activated:
            self._activate(key, identifier, model_type, wanted.get("defaultInference"), emit)
        return {
            "status": "loaded",
            "modelKey": key,
            "instanceId": identifier,
            "activated": activated,
            "totalTimeMs": _since(started),
            "message": "Model loaded successfully via LM Studio SDK",
            "appliedConfig": applied,
            "warnings": warnings + differing,
        }

    def _load_in_lmstudio(
        self, wanted: dict[str, Any], model_type: str, kv_fields: list[Any], emit: Emit
    ) -> str:
        key, instance = wanted["modelKey"], wanted.get("instanceId")

        def on_progress(fraction: float) -> None:
            numbers = {"progress": round(fraction * 100, 1), "progressRaw": fraction}
            emit("model_load_progress", _load_names(wanted) | numbers)

        try:
            return self._link.load(
                model_type, key, instance, wanted.get("ttlSeconds") or None, kv_fields, on_progress
            )
        except ServerRefused as refusal:
            if refusal.code in UNKNOWN_MODEL:
                raise NotFound(f"Model not found: {key}") from None
            if "already exists" in refusal.message and instance:
                raise _taken(instance) from None
            raise BadGateway(refusal.message, code="load_failed") from None

    def _read_back(
        self, model_type: str, identifier: str, config: dict[str, Any], kv_fields: list[Any]
    ) -> tuple[dict[str, Any], list[str]]:
        """What LM Studio applied, and a warning for each requested field that it did not apply."""
        try:
            applied = loadconfig.from_kv(self._link.load_config(model_type, identifier))
        except (GatewayError, ServerRefused) as error:
            # the model is loaded, so this does not fail the load
            return {}, [f"appliedConfig: could not be read back from LM Studio ({error})"]
        sent = loadconfig.from_kv(kv_fields)
        relevant = {name: value for name, value in config.items() if name in sent}
        return applied, loadconfig.differences(relevant, applied)

    def _reject_taken(self, instance: str | None) -> None:
        if instance and any(model.get("identifier") == instance for _, model in self._loaded()):
            raise _taken(instance)

    # Unloading --------------------------------------------------------------------------------

    def unload(self, wanted: dict[str, Any], emit: Emit) -> dict[str, Any]:
        """Unload the instance that ``modelKey``, ``instanceId`` or both name; returns the response
        body."""
        started = time.monotonic()
        namespace, model = self._find_instance(wanted)
        names = {"modelKey": model.get("modelKey", ""), "instanceId": model["identifier"]}
        emit("model_unload_start", dict(names))
        try:
            self._link.unload(namespace, model["identifier"])
        except ServerRefused as refusal:
            emit("error", _failed("model_unload", refusal.message, started))
            if refusal.code in NOT_LOADED:
                raise NotFound(f"Model not loaded: {model['identifier']}") from None
            raise BadGateway(refusal.message, code="unload_failed") from None
        except GatewayError as error:
            emit("error", _failed("model_unload", error.message, started))
            raise
        self._deactivate_unloaded(model, emit)
        took = {"totalTimeMs": _since(started)}
        emit("model_unload_complete", names | took)
        message = "Model unloaded successfully via LM Studio SDK"
        return {"status": "unloaded", **names, **took, "message": message}

    def _find_instance(self, wanted: dict[str, Any]) -> tuple[str, Model]:
        key, instance = wanted.get("modelKey"), wanted.get("instanceId")
        found = [
            (namespace, model)
            for namespace, model in self._loaded()
            if (instance is None or model.get("identifier") == instance)
            and (key is None or key in _names(model))
        ]
        if not found:
            raise NotFound(f"Model not loaded: {instance or key}")
        # LM Studio names the first instance of a model after its key
        exact = [entry for entry in found if entry[1].get("identifier") == key]
        if len(found) > 1 and not exact:
            instances = ", ".join(str(model.get("identifier")) for _, model in found)
            raise Conflict(f"Several instances of {key} are loaded: name one ({instances}).")
        return exact[0] if exact else found[0]

    def _deactivate_unloaded(self, model: Model, emit: Emit) -> None:
        active = self._store.active()
        if active is None:
            return
        if active.instance_id is None:
            unloaded = active.model_key in _names(model) and not self._is_loaded(active)
        else:
            unloaded = active.instance_id == model.get("identifier")
        if unloaded:
            self._deactivate(active, emit)

    # Activating -------------------------------------------------------------------------------

    def activate(self, wanted: dict[str, Any], emit: Emit) -> dict[str, Any]:
        """Make a model the active one; LM Studio's own state does not change."""
        key, instance = wanted["modelKey"], wanted.get("instanceId")
        default_inference = wanted.get("defaultInference")
        self._activate(key, instance, self._likely_type(key), default_inference, emit)
        return {
            "status": "activated",
            "modelKey": key,
            "instanceId": instance,
            "defaultInference": default_inference or {},
            "message": f"{instance or key} is used for requests that name no model",
        }

    def deactivate(self, emit: Emit) -> dict[str, Any]:
        """Make no model the active one."""
        active = self._store.active()
        if active is not None:
            self._deactivate(active, emit)
        return {"status": "deactivated"}

    def _activate(
        self,
        key: str,
        instance: str | None,
        model_type: str,
        default_inference: dict[str, Any] | None,
        emit: Emit,
    ) -> None:
        active = Active(key, instance, model_type, default_inference or {})
        self._store.set_active(active)
        emit("model_activate", _active_names(active))

    def _deactivate(self, active: Active, emit: Emit) -> None:
        self._store.set_active(None)
        emit("model_deactivate", _active_names(active))

    # LM Studio's models ------------------------------------------------------------------------

    def _loaded(self) -> list[tuple[str, Model]]:
        """Every loaded instance with its namespace."""
        return [(namespace, model) for namespace in TYPES for model in self._link.loaded(namespace)]

    def _type_of(self, key: str) -> str | None:
        """``llm`` or ``embedding``; None when LM Studio has no such model."""
        for model in self._link.downloaded():
            if key in _names(model):
                return "embedding" if model.get("type") == "embedding" else "llm"
        return None

    def _likely_type(self, key: str) -> str:
        """The type that LM Studio reports or, while LM Studio is unreachable, a guess from the key.

        Activating changes only the gateway, so it works without LM Studio.
        """
        try:
            known = self._type_of(key) if self._link.is_connected() else None
        except (GatewayError, ServerRefused):
            known = None
        return known or ("embedding" if "embed" in key.lower() else "llm")

    def _is_loaded(self, active: Active) -> bool:
        return _matches_any(active, [model for _, model in self._loaded()])

    def _describe_active(self, loaded: list[Model]) -> dict[str, Any] | None:
        active = self._store.active()
        if active is None:
            return None
        names = _active_names(active)
        return names | {"type": active.model_type, "loaded": _matches_any(active, loaded)}


def _names(model: Model) -> set[Any]:
    """The names under which a model or an instance is known."""
    return {model.get("modelKey"), model.get("path"), model.get("indexedModelIdentifier")}


def _matches_any(active: Active, loaded: list[Model]) -> bool:
    if active.instance_id is not None:
        return any(model.get("identifier") == active.instance_id for model in loaded)
    return any(active.model_key in _names(model) | {model.get("identifier")} for model in loaded)


def _active_names(active: Active) -> dict[str, Any]:
    return {
        "modelKey": active.model_key,
        "instanceId": active.instance_id,
        "defaultInference": active.default_inference,
    }


def _load_names(wanted: dict[str, Any]) -> dict[str, Any]:
    return {"modelKey": wanted["modelKey"], "instanceId": wanted.get("instanceId")}


def _config(wanted: dict[str, Any]) -> dict[str, Any]:
    return dict(wanted.get("loadConfig") or {})


def _failed(operation: str, why: str, started: float) -> dict[str, Any]:
    return {"operation": operation, "error": without_quotes(why), "totalTimeMs": _since(started)}


def _taken(instance: str) -> Conflict:
    return Conflict(
        f"Model already loaded: instance {instance} exists. Use another instanceId or unload it."
    )


def _since(started: float) -> int:
    return round((time.monotonic() - started) * 1000)


def _describe(model: Model) -> Model:
    """A downloaded model with ``size`` beside LM Studio's own fields."""
    return {**model, "size": model.get("sizeBytes")}


def _describe_instance(model: Model) -> Model:
    return {"ttlMs": None, **model}
