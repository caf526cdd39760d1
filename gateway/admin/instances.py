"""Finds, matches and describes models in what LM Studio lists."""

from __future__ import annotations

from typing import Any

from gateway.errors import Conflict, NotFound
from gateway.state import Active

#: A model or an instance, with the fields that LM Studio gives it.
Model = dict[str, Any]


def find_instance(wanted: dict[str, Any], loaded: list[tuple[str, Model]]) -> tuple[str, Model]:
    """The loaded instance that is meant, with its namespace."""
    key, instance = wanted.get("modelKey"), wanted.get("instanceId")
    found = [
        (namespace, model)
        for namespace, model in loaded
        if isinstance(model.get("identifier"), str)
        and (instance is None or model["identifier"] == instance)
        and (key is None or key in model_names(model))
    ]
    if not found:
        raise NotFound(f"Model not loaded: {instance or key}")
    # LM Studio names the first instance of a model after its key
    exact = [entry for entry in found if entry[1]["identifier"] == key]
    if len(found) > 1 and not exact:
        instances = ", ".join(model["identifier"] for _, model in found)
        raise Conflict(f"Several instances of {key} are loaded: name one ({instances}).")
    return exact[0] if exact else found[0]


def model_names(model: Model) -> set[str]:
    """The names under which a model or an instance is known."""
    names = (model.get("modelKey"), model.get("path"), model.get("indexedModelIdentifier"))
    return {name for name in names if isinstance(name, str)}


def matches_any(active: Active, loaded: list[Model]) -> bool:
    if active.instance_id is not None:
        return any(model.get("identifier") == active.instance_id for model in loaded)
    key = active.model_key
    return any(key in model_names(model) or key == model.get("identifier") for model in loaded)


def active_names(active: Active) -> dict[str, Any]:
    return {
        "modelKey": active.model_key,
        "instanceId": active.instance_id,
        "defaultInference": active.default_inference,
    }


def describe(model: Model) -> Model:
    """A downloaded model with ``size`` beside LM Studio's own fields."""
    return {**model, "size": model.get("sizeBytes")}


def describe_instance(model: Model) -> Model:
    return {"ttlMs": None, **model}
