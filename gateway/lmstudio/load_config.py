"""Converts ``loadConfig`` to LM Studio's KV fields, and back.

LM Studio takes a load configuration as a list of ``{"key", "value"}`` fields. The keys are those of
the SDK's ``_kv_config.py`` (lmstudio 1.5.0), which follows ``kv-config/schema.ts`` of lmstudio-js.
Only LM Studio's server knows ``llm.load.llama.cpuThreadPoolSize`` and the keys of the last rows of
the table. The Python SDK silently drops what it does not know, so the fields are built here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gateway.errors import BadRequest

KvField = dict[str, Any]

GPU_RATIO = "llama.acceleration.offloadRatio"
GPU_SPLIT = "load.gpuSplitConfig"
GPU_SPLIT_FIELDS = ("mainGpu", "splitStrategy", "disabledGpus")


@dataclass(frozen=True)
class _Field:
    """One plain field: its name in ``loadConfig`` and the end of its KV key.

    A ``checkbox`` field is sent as ``{"checked": bool, "value": …}``; LM Studio silently ignores a
    bare value. ``embedding`` says whether embedding models have the field too.
    """

    name: str
    key: str
    checkbox: bool = False
    embedding: bool = False
    #: The value in ``loadConfig`` for an unchecked checkbox; None leaves the field out.
    unchecked: Any = None

    def full_key(self, model_type: str) -> str:
        """Return the KV key for ``llm`` or ``embedding`` models."""
        return self.key if self.key.startswith("load.") else f"{model_type}.load.{self.key}"


#: Every field of ``loadConfig`` that maps to one KV field; ``gpu`` does not and is handled apart.
FIELDS: tuple[_Field, ...] = (
    _Field("contextLength", "contextLength", embedding=True),
    _Field("cpuThreads", "llama.cpuThreadPoolSize"),
    _Field("ropeFrequencyBase", "llama.ropeFrequencyBase", checkbox=True, embedding=True),
    _Field("ropeFrequencyScale", "llama.ropeFrequencyScale", checkbox=True, embedding=True),
    _Field("evalBatchSize", "llama.evalBatchSize", embedding=True),
    _Field("flashAttention", "llama.flashAttention"),
    _Field("keepModelInMemory", "llama.keepModelInMemory", embedding=True),
    _Field("tryMmap", "llama.tryMmap", embedding=True),
    _Field("useFp16ForKVCache", "llama.useFp16ForKVCache"),
    _Field(
        "llamaKCacheQuantizationType",
        "llama.kCacheQuantizationType",
        checkbox=True,
        unchecked=False,
    ),
    _Field(
        "llamaVCacheQuantizationType",
        "llama.vCacheQuantizationType",
        checkbox=True,
        unchecked=False,
    ),
    _Field("offloadKVCacheToGpu", "offloadKVCacheToGpu"),
    _Field("numExperts", "numExperts"),
    _Field("seed", "seed", checkbox=True, embedding=True),
    _Field("gpuStrictVramCap", "load.gpuStrictVramCap", embedding=True),
    _Field("numParallelSessions", "numParallelSessions"),
    _Field("useUnifiedKvCache", "useUnifiedKvCache"),
    _Field("numCpuExpertLayersRatio", "numCpuExpertLayersRatio"),
)


def to_kv(config: dict[str, Any], model_type: str) -> tuple[list[KvField], list[str]]:
    """Convert a validated ``loadConfig`` to KV fields for ``model_type`` (``llm``, ``embedding``).

    Also returns a warning for each field that this type of model does not have. Raises BadRequest
    for a value that KV fields can't express (``gpu.layers`` without ``gpu.ratio``).
    """
    fields: list[KvField] = []
    warnings: list[str] = []
    for field in FIELDS:
        if field.name not in config:
            continue
        if model_type == "embedding" and not field.embedding:
            warnings.append(f"{field.name}: embedding models have no such setting; not sent")
            continue
        value = config[field.name]
        if field.checkbox:
            value = {"checked": False} if value is False else {"checked": True, "value": value}
        fields.append({"key": field.full_key(model_type), "value": value})
    gpu_fields, gpu_warnings = _gpu_to_kv(config.get("gpu") or {}, model_type)
    return fields + gpu_fields, warnings + gpu_warnings


def from_kv(fields: Iterable[KvField]) -> dict[str, Any]:
    """Convert LM Studio's KV fields to a ``loadConfig`` with plain values, without unknown keys."""
    by_key = {str(field.get("key")): field.get("value") for field in fields}
    applied: dict[str, Any] = {}
    for field in FIELDS:
        for model_type in ("llm", "embedding"):
            key = field.full_key(model_type)
            if key not in by_key:
                continue
            value = by_key[key]
            if field.checkbox and isinstance(value, dict):
                value = value.get("value") if value.get("checked") else field.unchecked
            if value is not None:
                applied[field.name] = value
    gpu = _gpu_from_kv(by_key)
    if gpu:
        applied["gpu"] = gpu
    return applied


def differences(requested: dict[str, Any], applied: dict[str, Any]) -> list[str]:
    """Return a warning for each requested field that LM Studio does not report as applied."""
    # LM Studio may report an unchecked checkbox by leaving it out
    boxes = {field.name for field in FIELDS if field.unchecked is False}
    unchecked = {name for name in boxes if applied.get(name) is None}
    return [
        f"{path}: sent {value!r}, but LM Studio {_reported(path, applied)}"
        for path, value in _flatten(_as_sent(requested))
        if not _same(value, _lookup(path, applied) if path not in unchecked else False)
    ]


def _gpu_to_kv(gpu: dict[str, Any], model_type: str) -> tuple[list[KvField], list[str]]:
    fields: list[KvField] = []
    warnings: list[str] = []
    ratio = gpu.get("ratio")
    if "layers" in gpu:
        if ratio is not None:
            warnings.append(
                "gpu.layers: LM Studio's load protocol has no layer count; gpu.ratio was sent"
            )
        elif gpu["layers"] == 0:
            ratio = 0
        else:
            message = "LM Studio's load protocol has no layer count; give gpu.ratio instead"
            raise BadRequest(
                "Validation failed",
                details=[{"path": ["loadConfig", "gpu", "layers"], "message": message}],
            )
    if ratio is not None:
        fields.append({"key": f"{model_type}.load.{GPU_RATIO}", "value": ratio})
    if any(name in gpu for name in GPU_SPLIT_FIELDS):
        fields.append({"key": GPU_SPLIT, "value": _split_config(gpu)})
        if gpu.get("splitStrategy") == "evenly" and "mainGpu" in gpu:
            warnings.append("gpu.mainGpu: has no effect with splitStrategy 'evenly'; not sent")
    return fields, warnings


def _split_config(gpu: dict[str, Any]) -> dict[str, Any]:
    """Combine the three split fields into LM Studio's one. A main GPU alone means that LM Studio
    should favour it."""
    strategy = gpu.get("splitStrategy", "favorMainGpu" if "mainGpu" in gpu else "evenly")
    prioritised = strategy == "favorMainGpu"
    return {
        "strategy": "priorityOrder" if prioritised else "evenly",
        "disabledGpus": list(gpu.get("disabledGpus") or []),
        "priority": [gpu["mainGpu"]] if prioritised and "mainGpu" in gpu else [],
        "customRatio": [],
    }


def _gpu_from_kv(by_key: dict[Any, Any]) -> dict[str, Any]:
    gpu: dict[str, Any] = {}
    for model_type in ("llm", "embedding"):
        ratio = by_key.get(f"{model_type}.load.{GPU_RATIO}")
        if ratio is not None:
            gpu["ratio"] = ratio
    split = by_key.get(GPU_SPLIT)
    if isinstance(split, dict):
        gpu["disabledGpus"] = split.get("disabledGpus") or []
        priority = split.get("priority") or []
        if split.get("strategy") == "evenly":
            gpu["splitStrategy"] = "evenly"
        elif split.get("strategy") == "priorityOrder":
            gpu["splitStrategy"] = "favorMainGpu"
            if len(priority) == 1:
                gpu["mainGpu"] = priority[0]
    return gpu


def _as_sent(requested: dict[str, Any]) -> dict[str, Any]:
    """Return the requested fields without those that :func:`to_kv` has warned about."""
    gpu = dict(requested.get("gpu") or {})
    if gpu.pop("layers", None) == 0:
        gpu.setdefault("ratio", 0)
    if gpu.get("splitStrategy") == "evenly":
        gpu.pop("mainGpu", None)
    if gpu:
        return {**requested, "gpu": gpu}
    return {name: value for name, value in requested.items() if name != "gpu"}


def _flatten(config: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, dict):
            for inner, inner_value in value.items():
                yield f"{name}.{inner}", inner_value
        else:
            yield name, value


def _lookup(path: str, config: dict[str, Any]) -> Any:
    value: Any = config
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _same(sent: Any, reported: Any) -> bool:
    # LM Studio reports the ends of the ratio as numbers or as "off" and "max"
    ends = {"off": 0, "max": 1}
    plain = [ends.get(v, v) if isinstance(v, str) else v for v in (sent, reported)]
    return bool(plain[0] == plain[1])


def _reported(path: str, applied: dict[str, Any]) -> str:
    value = _lookup(path, applied)
    return "does not report it as applied" if value is None else f"applied {value!r}"
