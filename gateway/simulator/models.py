"""The models: the "downloaded" ones, their load settings, and what is loaded for how long."""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any
from uuid import uuid4

import gevent

JsonObject = dict[str, Any]
_NO_MATCH = "generic.noModelMatchingQuery"


def _model(row: str) -> JsonObject:
    """Return a row of the table below as ``listDownloadedModels`` gives it."""
    kind, key, publisher, architecture, params, size, context, skill, form = row.split()
    name = key.rpartition("/")[2]
    path = f"{publisher}/{name}-GGUF/{name}-Q4_K_M.gguf"
    info = {
        "type": kind, "modelKey": key, "format": form, "publisher": publisher, "path": path,
        "displayName": name.replace("-", " ").title(), "sizeBytes": round(float(size) * 1e9),
        "indexedModelIdentifier": path, "paramsString": params, "architecture": architecture,
        "quantization": {"name": "Q4_K_M", "bits": 4}, "maxContextLength": int(context),
    }  # fmt: skip
    skills = {"vision": skill == "vision", "trainedForToolUse": skill == "tools"}
    return info | skills if kind == "llm" else info


#: type, key, publisher, architecture, parameters, GB, longest context, skill, file format
_TABLE = """\
llm qwen2.5-7b-instruct lmstudio-community qwen2 7B 4.68 32768 tools gguf
llm qwen2-1.5b-instruct lmstudio-community qwen2 1.5B 0.99 32768 - gguf
llm llava-v1.6-mistral-7b cjpais llama 7B 4.99 32768 vision gguf
llm llama-3.3-70b-instruct lmstudio-community llama 70B 42.5 131072 tools gguf
llm deepseek-r1-671b unsloth deepseek2 671B 404 163840 - gguf
embedding text-embedding-nomic-embed-text-v1.5 nomic-ai nomic-bert 137M 0.084 2048 - gguf
llm publisher/model-with-slash publisher llama 1B 0.7 8192 - gguf
reranker future-reranker future bert 1B 1 512 - gguf
llm future-format-8b future llama 8B 1 8192 - hologram"""
_ROWS = [_model(row) for row in _TABLE.splitlines()]
MODELS = {model["modelKey"]: model for model in _ROWS[:-2]}
#: Models that a newer LM Studio might list: the SDK's types know neither the kind of the first nor
#: the file format of the second.
UNFAMILIAR_MODELS = _ROWS[-2:]

#: Load setting → default, which has the form of its values (lmstudio/_kv_config.py, 1.5.0).
_ANY_MODEL: JsonObject = {
    "contextLength": 4096, "llama.acceleration.offloadRatio": "max", "llama.tryMmap": True,
    "llama.keepModelInMemory": True, "llama.ropeFrequencyBase": {"checked": False, "value": 0},
    "llama.ropeFrequencyScale": {"checked": False, "value": 0}, "llama.evalBatchSize": 512,
    "seed": {"checked": False, "value": -1},
}  # fmt: skip
_LLM_ONLY: JsonObject = {
    "llama.autoFit": True, "llama.cpuThreadPoolSize": 4,
    "llama.flashAttention": False, "llama.useFp16ForKVCache": True, "numExperts": 0,
    "llama.kCacheQuantizationType": {"checked": False, "value": "f16"},
    "llama.vCacheQuantizationType": {"checked": False, "value": "f16"},
    "numCpuExpertLayersRatio": "off", "numParallelSessions": 4, "offloadKVCacheToGpu": True,
    "useUnifiedKvCache": True,
}  # fmt: skip
_SPLIT: JsonObject = {"strategy": "evenly", "disabledGpus": [], "priority": [], "customRatio": []}
_TYPES = {"f32", "f16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"}
_WORDS = ({"max", "off"}, {"evenly", "priorityOrder", "custom"}, _TYPES)


def _fits(value: Any, default: Any) -> bool:
    """Whether a setting's value has the form of its default."""
    match default, value:
        case ({"checked": _}, {"checked": False}) | (bool(), bool()) | ("f16", bool()):
            return True
        case dict(), dict():  # such as a checkbox, whose bare value does not fit
            return all(_fits(value.get(name), default[name]) for name in default)
        case list(), list():
            return all(_fits(one, 0) for one in value)
        case str(), str():
            return any({value, default} <= words for words in _WORDS)
        case (_, bool()) | (bool(), _):
            return False
        case "max" | "off", int() | float():
            return 0 <= value <= 1
        case int(), int() | float():
            return bool(value >= min(default, 1))
    return False


class Refusal(Exception):
    """LM Studio's error object; clients classify errors by the ``code`` in ``displayData``."""

    def __init__(self, title: str, cause: str = "", **display: Any) -> None:
        super().__init__(title)
        error = {"title": title, "rootTitle": title, "cause": cause, "displayData": display}
        self.error: JsonObject = {name: value for name, value in error.items() if value}


@dataclass(eq=False)
class Instance:
    """A model from the request to load it on; ``GET /_simulator/state`` shows these fields."""

    namespace: str  #: ``llm`` or ``embedding``
    modelKey: str
    identifier: str = ""
    fields: JsonObject = field(default_factory=dict)  #: the load settings that were sent
    ttlMs: int | None = None
    outcome: str = "loading"  #: then ``loaded``, ``failed`` or ``cancelled``
    progress: float = 0.0  #: 0 to 1
    config: JsonObject = field(default_factory=dict)
    ignored: JsonObject = field(default_factory=dict)
    contextLength: int = 0  #: in tokens
    instanceReference: str = field(default_factory=lambda: uuid4().hex)
    lastUsedTime: int | None = None  #: the end of its last inference, in epoch ms

    def info(self) -> JsonObject:
        """Return the model's fields and those of the instance, as ``listLoaded`` gives them."""
        own = ("identifier", "instanceReference", "contextLength", "ttlMs", "lastUsedTime")
        return MODELS[self.modelKey] | {name: getattr(self, name) for name in own}

    def cancel(self) -> None:
        """Cancel the load, if it is still in progress, at its next step."""
        self.outcome = "cancelled" if self.outcome == "loading" else self.outcome


class Memory:
    """All loaded instances by identifier, and every attempted load."""

    def __init__(self) -> None:
        self.instances: dict[str, Instance] = {}
        self.loads: deque[Instance] = deque(maxlen=5000)

    def of(self, namespace: str) -> list[Instance]:
        """Return the loaded instances of a namespace, oldest first."""
        return [one for one in self.instances.values() if one.namespace == namespace]

    def find(self, namespace: str, specifier: JsonObject, code: str = _NO_MATCH) -> Instance:
        """Return the first loaded instance that matches, or raise Refusal with the code."""
        query = specifier.get("query") or {}
        if reference := specifier.get("instanceReference"):
            query, code = {"instanceReference": reference}, "generic.specificModelUnloaded"
        wanted = {name: value for name, value in query.items() if value is not None}
        for one in self.of(namespace):
            if wanted.items() <= (one.info() | {"domain": namespace}).items():
                return one
        sample = [one.identifier for one in self.of(namespace)][:5]
        title = f"Cannot find a loaded model: {query}"
        raise Refusal(title, code=code, query=query, loadedModelsSample=sample)

    def load(self, new: Instance, failure: str | None, seconds: float = 0) -> Iterator[JsonObject]:
        """Load in the calling greenlet, yielding LM Studio's messages; raise Refusal on failure.

        ``failure`` makes the load fail with this cause; ``seconds`` 0 takes as long as the size of
        the model suggests.
        """
        self.loads.append(new)
        try:
            size = self._prepare(new)["sizeBytes"] / 1e9
            yield {"type": "resolved", "info": MODELS[new.modelKey]}
            if size > 100:
                failure = f"insufficient memory: the model needs about {size:.2f} GB."
            seconds = seconds or min(max(size / 8.5, 0.1), 5)
            steps = max(20, int(seconds * 20))
            for step in range(1, steps + 1):
                gevent.sleep(seconds / steps)
                if new.outcome == "cancelled":
                    raise Refusal("Failed to load model", "Operation canceled.")
                if failure and step > 5:
                    raise Refusal("Failed to load model", failure)
                new.progress = step / steps
                yield {"type": "progress", "progress": new.progress}
        except BaseException as error:  # also a killed greenlet, or a generator that is closed
            ended = "failed" if isinstance(error, Refusal) else "cancelled"
            new.outcome = ended if new.outcome == "loading" else new.outcome
            raise
        self.instances[new.identifier], new.outcome = new, "loaded"
        if new.ttlMs is not None:
            gevent.spawn(self._expire, new, time.time() * 1000, new.ttlMs)
        yield {"type": "success", "info": new.info()}

    def _prepare(self, new: Instance) -> JsonObject:
        """Give it a free identifier and the settings that apply; ignore the others silently."""
        key, model = new.modelKey, MODELS.get(new.modelKey)
        if model is None:
            title = f"Cannot find a model with path or key: {key}"
            raise Refusal(title, code="generic.pathNotFound", path=key, totalModels=len(MODELS))
        if model["type"] != new.namespace:
            title = f"Model {key} is of the type {model['type']}, expected {new.namespace}"
            raise Refusal(title, code="generic.domainMismatch", path=key)
        loading = [one for one in self.loads if one.outcome == "loading" and one is not new]
        taken = {*self.instances, *(one.identifier for one in loading)} - {""}
        if new.identifier in taken:
            raise Refusal(f'Model with identifier "{new.identifier}" already exists')
        more = (f"{key}:{number}" for number in count(2) if f"{key}:{number}" not in taken)
        new.identifier = new.identifier or (next(more) if key in taken else key)
        settings = _ANY_MODEL | {"contextLength": min(4096, model["maxContextLength"])}
        settings |= _LLM_ONLY if new.namespace == "llm" else {}
        config = {f"{new.namespace}.load.{name}": settings[name] for name in settings}
        config |= {"load.gpuSplitConfig": _SPLIT, "load.gpuStrictVramCap": False}
        for name, value in new.fields.items():
            fits = name in config and _fits(value, config[name])
            (new.config if fits else new.ignored)[name] = value
        new.config = config | new.config
        new.contextLength = int(new.config[f"{new.namespace}.load.contextLength"])
        return model

    def _expire(self, instance: Instance, loaded: float, ttl: int) -> None:
        """Unload an instance once it has been idle for its TTL; all times are in ms."""
        while (left := (instance.lastUsedTime or loaded) + ttl - time.time() * 1000) > 0:
            gevent.sleep(left / 1000)
        if self.instances.get(instance.identifier) is instance:
            del self.instances[instance.identifier]
