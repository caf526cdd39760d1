"""Lists, loads, unloads and activates models. It knows nothing of HTTP.

Each operation reports its events through ``emit(event, data)``; README.rst lists their types.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import gevent

from gateway.admin.instances import (
    Model,
    active_names,
    describe,
    describe_instance,
    find_instance,
    matches_any,
    model_names,
)
from gateway.errors import (
    BadGateway,
    Conflict,
    GatewayError,
    InternalError,
    NotFound,
    without_quotes,
)
from gateway.lmstudio import Link, ServerRefused
from gateway.lmstudio import load_config as loadconfig
from gateway.state import Active, SharedStore

Emit = Callable[[str, dict[str, Any]], None]
TYPES = ("llm", "embedding")
#: Seconds for which an activation waits for the type of its model.
TYPE_TIMEOUT = 1.0

#: LM Studio's codes for an unknown model, and for a name under which nothing is loaded.
UNKNOWN_MODEL = {"generic.pathNotFound", "generic.noModelMatchingQuery"}
NOT_LOADED = {
    "generic.identifierNotFound",
    "generic.noModelMatchingQuery",
    "generic.specificModelUnloaded",
}

logger = logging.getLogger(__name__)


class Models:
    """Model management over one link and one store."""

    def __init__(self, link: Link, store: SharedStore) -> None:
        self._link = link
        self._store = store
        #: The type of each downloaded model by its names, as LM Studio last reported them.
        self._types: dict[str, str] = {}

    # Listing ----------------------------------------------------------------------------------

    def listing(self) -> dict[str, Any]:
        """``{"loaded": [...], "downloaded": [...], "active": {...} or None}``."""
        loaded = self._loaded()
        downloaded = [describe(model) for model in self._downloaded()]
        return {
            "loaded": [describe_instance(model) for _, model in loaded],
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
        except gevent.GreenletExit:
            emit("error", _failed("model_load", "cancelled", started))
            raise
        except Exception:
            emit("error", _failed("model_load", InternalError().message, started))
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
        activate = bool(wanted.get("activate", True))
        activation: gevent.Greenlet[..., str] | None = None
        try:
            applied, differing = self._read_back(model_type, identifier, config, kv_fields)
            problem = ""
            if activate:
                # in a greenlet of its own, because a kill must not interrupt the store
                activation = gevent.spawn(
                    self._activate_loaded, wanted, identifier, model_type, emit
                )
                problem = activation.get()
        except BaseException:
            gevent.spawn(self._undo_interrupted, identifier, activation, emit)
            raise
        return {
            "status": "loaded",
            "modelKey": key,
            "instanceId": identifier,
            "activated": activate and not problem,
            "totalTimeMs": _since(started),
            "message": "Model loaded successfully via LM Studio SDK",
            "appliedConfig": applied,
            "warnings": warnings + differing + ([problem] if problem else []),
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
            if refusal.reason in UNKNOWN_MODEL:
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
        except GatewayError as error:
            # the model is loaded, so this does not fail the load
            return {}, [f"appliedConfig: could not be read back from LM Studio ({error.message})"]
        sent = loadconfig.from_kv(kv_fields)
        relevant = {name: value for name, value in config.items() if name in sent}
        return applied, loadconfig.differences(relevant, applied)

    def _activate_loaded(
        self, wanted: dict[str, Any], identifier: str, model_type: str, emit: Emit
    ) -> str:
        """Activate a model that was just loaded; returns a warning, empty unless that fails.

        The load has succeeded all the same: a client that retried it would load a second copy.
        """
        default_inference = wanted.get("defaultInference")
        try:
            self._activate(wanted["modelKey"], identifier, model_type, default_inference, emit)
        except GatewayError as error:
            return f"activate: the model is loaded, but could not be activated ({error.message})"
        return ""

    def undo_load(self, result: dict[str, Any], emit: Emit) -> None:
        """Unload what :meth:`load` has loaded, because its client disconnected without knowing."""
        instance = result["instanceId"]
        try:
            self.unload({"instanceId": instance}, emit)
        except NotFound:
            pass
        except GatewayError as error:
            logger.warning(
                "%s was loaded for a client that disconnected and could not be unloaded: %s",
                instance,
                error.message,
            )

    def _undo_interrupted(
        self, identifier: str, activation: gevent.Greenlet[..., str] | None, emit: Emit
    ) -> None:
        if activation is not None:
            activation.join()
        self.undo_load({"instanceId": identifier}, emit)

    def _reject_taken(self, instance: str | None) -> None:
        if instance and any(model.get("identifier") == instance for _, model in self._loaded()):
            raise _taken(instance)

    # Unloading --------------------------------------------------------------------------------

    def unload(self, wanted: dict[str, Any], emit: Emit) -> dict[str, Any]:
        """Unload the instance that ``modelKey``, ``instanceId`` or both name; returns the response
        body."""
        started = time.monotonic()
        loaded = self._loaded()
        namespace, model = find_instance(wanted, loaded)
        others = [other for _, other in loaded if other is not model]
        names = {"modelKey": model.get("modelKey", ""), "instanceId": model["identifier"]}
        emit("model_unload_start", dict(names))
        try:
            self._link.unload(namespace, model["identifier"])
        except ServerRefused as refusal:
            emit("error", _failed("model_unload", refusal.message, started))
            if refusal.reason in NOT_LOADED:
                raise NotFound(f"Model not loaded: {model['identifier']}") from None
            raise BadGateway(refusal.message, code="unload_failed") from None
        except GatewayError as error:
            emit("error", _failed("model_unload", error.message, started))
            raise
        self._deactivate_unloaded(model, others, emit)
        took = {"totalTimeMs": _since(started)}
        emit("model_unload_complete", names | took)
        message = "Model unloaded successfully via LM Studio SDK"
        return {"status": "unloaded", **names, **took, "message": message}

    def _deactivate_unloaded(self, model: Model, others: list[Model], emit: Emit) -> None:
        """Deactivate the active model if no instance of it is left after an unload.

        ``others`` were loaded beside it; they count if LM Studio doesn't say what is loaded now.
        """
        active = self._store.active()
        if active is None:
            return
        if active.instance_id is None:
            with suppress(GatewayError):
                others = [other for _, other in self._loaded()]
            unloaded = active.model_key in model_names(model) and not matches_any(active, others)
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
        emit("model_activate", active_names(active))

    def _deactivate(self, active: Active, emit: Emit) -> None:
        self._store.set_active(None)
        emit("model_deactivate", active_names(active))

    # LM Studio's models ------------------------------------------------------------------------

    def _loaded(self) -> list[tuple[str, Model]]:
        """Every loaded instance with its namespace."""
        return [(namespace, model) for namespace in TYPES for model in self._link.loaded(namespace)]

    def _type_of(self, key: str) -> str | None:
        """``llm`` or ``embedding``; None when LM Studio has no such model."""
        self._downloaded()
        return self._types.get(key)

    def _downloaded(self) -> list[Model]:
        """Every downloaded model; remembers the types."""
        models = self._link.downloaded()
        self._types = {
            name: "embedding" if model.get("type") == "embedding" else "llm"
            for model in reversed(models)
            for name in model_names(model)
        }
        return models

    def _likely_type(self, key: str) -> str:
        """The type that LM Studio reports. While LM Studio does not answer, the one that it last
        reported, or else a guess from the key.

        Activating changes only the gateway, so it works without LM Studio.
        """
        with suppress(GatewayError), gevent.Timeout(TYPE_TIMEOUT, False):
            if self._link.is_connected():
                self._downloaded()
        return self._types.get(key) or ("embedding" if "embed" in key.lower() else "llm")

    def _describe_active(self, loaded: list[Model]) -> dict[str, Any] | None:
        active = self._store.active()
        if active is None:
            return None
        names = active_names(active)
        return names | {"type": active.model_type, "loaded": matches_any(active, loaded)}


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
