"""The models that the simulator has "downloaded", and the load settings it understands.

Setting keys and the form of their values follow ``lmstudio/_kv_config.py`` (1.5.0); the keys that
no Python SDK sends come from the table in ``lmstudio.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

JsonObject = dict[str, Any]
Check = Callable[[Any], bool]

#: LM Studio's own default context length, in tokens, for models that can hold as much.
DEFAULT_CONTEXT_LENGTH = 4096


@dataclass(frozen=True)
class Model:
    """One downloaded model: ``type`` is ``llm`` or ``embedding``, sizes are bytes and tokens."""

    type: str
    key: str
    display_name: str
    publisher: str
    architecture: str
    params: str
    size_bytes: int
    max_context_length: int
    load_seconds: float = 0.2
    load_steps: int = 20
    vision: bool = False
    tool_use: bool = False
    format: str = "gguf"
    shortage: str | None = None  #: why it can't be loaded

    def info(self) -> JsonObject:
        """Return the fields that ``listDownloadedModels`` gives (lmstudio.md section 1)."""
        file_name = self.key.rpartition("/")[2]
        path = f"{self.publisher}/{file_name}-GGUF/{file_name}-Q4_K_M.gguf"
        info: JsonObject = {
            "type": self.type,
            "modelKey": self.key,
            "format": self.format,
            "displayName": self.display_name,
            "publisher": self.publisher,
            "path": path,
            "sizeBytes": self.size_bytes,
            "indexedModelIdentifier": path,
            "paramsString": self.params,
            "architecture": self.architecture,
            "quantization": {"name": "Q4_K_M", "bits": 4},
            "maxContextLength": self.max_context_length,
        }
        if self.type == "llm":
            info |= {"vision": self.vision, "trainedForToolUse": self.tool_use}
        return info


_GB = 1_000_000_000
MODELS = {
    model.key: model
    for model in (
        Model("llm", "qwen2.5-7b-instruct", "Qwen2.5 7B Instruct", "lmstudio-community", "qwen2",
              "7B", int(4.68 * _GB), 32768, load_seconds=0.4, tool_use=True),
        Model("llm", "qwen2-1.5b-instruct", "Qwen2 1.5B Instruct", "lmstudio-community", "qwen2",
              "1.5B", int(0.99 * _GB), 32768),
        Model("llm", "llava-v1.6-mistral-7b", "Llava v1.6 Mistral 7B", "cjpais", "llama",
              "7B", int(4.99 * _GB), 32768, vision=True),
        Model("llm", "llama-3.3-70b-instruct", "Llama 3.3 70B Instruct", "lmstudio-community",
              "llama", "70B", int(42.5 * _GB), 131072, load_seconds=5.0, load_steps=100,
              tool_use=True),
        Model("llm", "deepseek-r1-671b", "DeepSeek R1 671B", "unsloth", "deepseek2",
              "671B", int(404 * _GB), 163840,
              shortage="insufficient memory: the model needs about 404.00 GB, 24.00 GB are free."),
        Model("embedding", "text-embedding-nomic-embed-text-v1.5", "Nomic Embed Text v1.5",
              "nomic-ai", "nomic-bert", "137M", int(0.084 * _GB), 2048, load_seconds=0.1),
        Model("llm", "publisher/model-with-slash", "Model With Slash", "publisher", "llama",
              "1B", int(0.7 * _GB), 8192, load_seconds=0.1),
    )
}  # fmt: skip

#: What a newer LM Studio might list: a kind and a file format that the SDK's types don't know.
UNFAMILIAR_MODELS: list[JsonObject] = [
    Model("reranker", "future-reranker", "Reranker", "future", "bert", "1B", _GB, 512).info(),
    Model("llm", "future-format-8b", "Future Format 8B", "future", "llama", "8B", _GB, 8192,
          format="hologram").info(),
]  # fmt: skip


def _boolean(value: Any) -> bool:
    return isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(value: Any) -> bool:
    return _number(value) and value == int(value)


def _positive(value: Any) -> bool:
    return _whole(value) and value >= 1


def _ratio(value: Any) -> bool:
    return value in ("max", "off") or (_number(value) and 0 <= value <= 1)


def _quantization(value: Any) -> bool:
    known = ("f32", "f16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
    return isinstance(value, bool) or value in known


def _checkbox(inner: Check) -> Check:
    """Return a check for ``{"checked": bool, "value": …}``; LM Studio ignores the bare value."""

    def check(value: Any) -> bool:
        if not isinstance(value, dict) or not isinstance(value.get("checked"), bool):
            return False
        return not value["checked"] or inner(value.get("value"))

    return check


def _gpu_split(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    lists = (value.get(name) for name in ("disabledGpus", "priority", "customRatio"))
    return value.get("strategy") in ("evenly", "priorityOrder", "custom") and all(
        isinstance(numbers, list) and all(map(_number, numbers)) for numbers in lists
    )


_ANY_MODEL: dict[str, tuple[Check, Any]] = {
    "contextLength": (_positive, DEFAULT_CONTEXT_LENGTH),
    "llama.acceleration.offloadRatio": (_ratio, "max"),
    "llama.keepModelInMemory": (_boolean, True),
    "llama.ropeFrequencyBase": (_checkbox(_number), {"checked": False, "value": 0}),
    "llama.ropeFrequencyScale": (_checkbox(_number), {"checked": False, "value": 0}),
    "llama.tryMmap": (_boolean, True),
}
_LLM_ONLY: dict[str, tuple[Check, Any]] = {
    "llama.autoFit": (_boolean, True),
    "llama.cpuThreadPoolSize": (_positive, 4),
    "llama.evalBatchSize": (_positive, 512),
    "llama.flashAttention": (_boolean, False),
    "llama.kCacheQuantizationType": (_checkbox(_quantization), {"checked": False, "value": "f16"}),
    "llama.useFp16ForKVCache": (_boolean, True),
    "llama.vCacheQuantizationType": (_checkbox(_quantization), {"checked": False, "value": "f16"}),
    "numCpuExpertLayersRatio": (_ratio, 0),
    "numExperts": (_whole, 0),
    "numParallelSessions": (_positive, 4),
    "offloadKVCacheToGpu": (_boolean, True),
    "seed": (_checkbox(_whole), {"checked": False, "value": -1}),
    "useUnifiedKvCache": (_boolean, True),
}
_SHARED: dict[str, tuple[Check, Any]] = {
    "load.gpuSplitConfig": (
        _gpu_split,
        {"strategy": "evenly", "disabledGpus": [], "priority": [], "customRatio": []},
    ),
    "load.gpuStrictVramCap": (_boolean, False),
}


def _settings(model_type: str) -> dict[str, tuple[Check, Any]]:
    """Return KV key → (check of its value, default) for one type of model."""
    own = _ANY_MODEL if model_type == "embedding" else _ANY_MODEL | _LLM_ONLY
    return {f"{model_type}.load.{name}": entry for name, entry in own.items()} | _SHARED


def apply_fields(model: Model, fields: Iterable[tuple[str, Any]]) -> tuple[JsonObject, JsonObject]:
    """Split the sent load settings into what applies, defaults included, and what is ignored.

    LM Studio says nothing about an unknown key or a badly formed value: it just doesn't apply.
    A ``contextLength`` beyond the model's maximum is accepted as it is.
    """
    settings = _settings(model.type)
    applied = {key: default for key, (_, default) in settings.items()}
    context_key = f"{model.type}.load.contextLength"
    applied[context_key] = min(DEFAULT_CONTEXT_LENGTH, model.max_context_length)
    ignored: JsonObject = {}
    for key, value in fields:
        if key in settings and settings[key][0](value):
            applied[key] = value
        else:
            ignored[key] = value
    return applied, ignored
