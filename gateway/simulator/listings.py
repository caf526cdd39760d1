"""The lists of models that LM Studio's HTTP APIs give."""

from __future__ import annotations

from gateway.simulator.catalogue import MODELS, JsonObject, Model
from gateway.simulator.delivery import Answer, error_answer, json_answer
from gateway.simulator.memory import Instance, Memory


def openai_models(memory: Memory) -> JsonObject:
    """Return ``GET /v1/models``: what is downloaded and what is loaded under another name."""
    names = dict.fromkeys([*MODELS, *memory.instances])
    return {"object": "list", "data": [_openai_model(name) for name in names]}


def _openai_model(name: str) -> JsonObject:
    return {"id": name, "object": "model", "owned_by": "organization_owner", "created": 0}


def one_model(memory: Memory, name: str) -> Answer:
    """Return ``GET /v1/models/<name>``."""
    if name in MODELS or name in memory.instances:
        return json_answer(_openai_model(name))
    return error_answer(404, f'Model "{name}" not found', "model", "model_not_found")


def loaded_of(memory: Memory, model: Model) -> list[Instance]:
    """Return the instances of a model, oldest first."""
    return [one for one in memory.instances.values() if one.model is model]


def native_models_v0(memory: Memory) -> JsonObject:
    """Return ``GET /api/v0/models``."""

    def entry(model: Model) -> JsonObject:
        loaded = loaded_of(memory, model)
        kind = "embeddings" if model.type == "embedding" else "vlm" if model.vision else "llm"
        return {
            "id": model.key,
            "object": "model",
            "type": kind,
            "publisher": model.publisher,
            "arch": model.architecture,
            "compatibility_type": model.format,
            "quantization": "Q4_K_M",
            "state": "loaded" if loaded else "not-loaded",
            "max_context_length": model.max_context_length,
        } | ({"loaded_context_length": loaded[0].context_length} if loaded else {})

    return {"object": "list", "data": [entry(model) for model in MODELS.values()]}


def native_models_v1(memory: Memory) -> JsonObject:
    """Return ``GET /api/v1/models``."""

    def entry(model: Model) -> JsonObject:
        return {
            "type": model.type,
            "publisher": model.publisher,
            "key": model.key,
            "display_name": model.display_name,
            "architecture": model.architecture,
            "quantization": {"name": "Q4_K_M", "bits_per_weight": 4},
            "size_bytes": model.size_bytes,
            "params_string": model.params,
            "max_context_length": model.max_context_length,
            "format": model.format,
            "loaded_instances": [
                {"id": one.identifier, "config": {"context_length": one.context_length}}
                for one in loaded_of(memory, model)
            ],
        }

    return {"models": [entry(model) for model in MODELS.values()]}
