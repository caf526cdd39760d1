"""Validates the admin bodies with marshmallow; for an unknown field it suggests a known one."""

from __future__ import annotations

import difflib
import itertools
from typing import Any

from marshmallow import INCLUDE, Schema, ValidationError, fields, validate, validates_schema

from gateway.errors import BadRequest

#: Details of a validation error, at most, and the characters of a client's field name in it.
MAX_DETAILS, MAX_NAME = 20, 512

CACHE_TYPES = ("f32", "f16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")


class _Number(fields.Float):
    """A JSON number: not a string that looks like one, not a boolean, not NaN."""

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.make_error("invalid")
        super()._deserialize(value, attr, data, **kwargs)
        return value  # unchanged: 1 must not become 1.0


class _WholeNumber(fields.Integer):
    """A JSON number without a fraction."""

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValidationError("Must be a whole number.")
        return value


class _Flag(fields.Boolean):
    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> bool:
        if not isinstance(value, bool):
            raise ValidationError("Must be true or false.")
        return value


class _Ratio(fields.Field[Any]):
    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> Any:
        if value in ("max", "off") and isinstance(value, str):
            return value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ValidationError('Must be a number from 0 to 1, "max" or "off".')
        return value


class _CacheType(fields.Field[Any]):
    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> Any:
        if value is False or (isinstance(value, str) and value in CACHE_TYPES):
            return value
        raise ValidationError(f"Must be one of {', '.join(CACHE_TYPES)}, or false.")


class _Items(fields.List[Any]):
    """A list whose length is checked before its items are."""

    def __init__(self, item: fields.Field[Any], most: int) -> None:
        super().__init__(item, validate=validate.Length(max=most))
        self._most = most

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> list[Any]:
        if isinstance(value, list) and len(value) > self._most:
            raise ValidationError(f"Longer than maximum length {self._most}.")
        return super()._deserialize(value, attr, data, **kwargs)


class _Strict(Schema):
    """A schema whose error for an unknown field suggests the nearest known one."""

    class Meta:
        unknown = INCLUDE

    @validates_schema(pass_original=True, skip_on_field_errors=False)
    def _reject_unknown(self, data: Any, original: Any, **kwargs: Any) -> None:
        if not isinstance(original, dict):
            return
        known = list(self.fields)
        names = (name for name in original if name not in self.fields)
        # each takes a comparison with every known name
        unknown = list(itertools.islice(names, MAX_DETAILS))
        problems = {name[:MAX_NAME]: [_unknown(name[:MAX_NAME], known)] for name in unknown}
        if problems:
            raise ValidationError(problems)


def _unknown(name: str, known: list[str]) -> str:
    lowered = {field.lower(): field for field in known}
    # the edit distance from "context_length" to "contextLength" overrates their difference
    plain = name.replace("_", "").replace("-", "").lower()
    near = difflib.get_close_matches(plain, list(lowered), n=1, cutoff=0.5)
    hint = f" Did you mean {lowered[near[0]]!r}?" if near else f" Known: {', '.join(known)}."
    return f"Unknown field {name!r}.{hint}"


def _number(low: float, high: float | None = None) -> _Number:
    return _Number(validate=validate.Range(min=low, max=high))


def _whole(low: int, high: int, about: str = "") -> _WholeNumber:
    return _WholeNumber(validate=validate.Range(min=low, max=high), metadata=_about(about))


def _flag(about: str = "") -> _Flag:
    return _Flag(metadata=_about(about))


def _ratio(about: str) -> _Ratio:
    share = {"type": "number", "minimum": 0, "maximum": 1}
    return _Ratio(metadata={"oneOf": [share, {"enum": ["max", "off"]}]} | _about(about))


def _cache_type(about: str) -> _CacheType:
    return _CacheType(metadata={"enum": [*CACHE_TYPES, False]} | _about(about))


def _text(about: str = "", **kwargs: Any) -> fields.String:
    length = validate.Length(min=1, max=512)
    return fields.String(validate=length, metadata=_about(about), **kwargs)


def _about(description: str) -> dict[str, str]:
    """The field's metadata, which ``/openapi.json`` shows beside its type and range."""
    return {"description": description} if description else {}


class GpuSchema(_Strict):
    ratio = _ratio("The share of the model on the GPU.")
    layers = _whole(
        0,
        10_000,
        "Layers on the GPU, for which LM Studio has no field. With `ratio` it is ignored with a"
        " warning; without, it can only be 0.",
    )
    mainGpu = _whole(0, 1024, "The GPU to fill first.")
    splitStrategy = fields.String(validate=validate.OneOf(["evenly", "favorMainGpu"]))
    disabledGpus = _Items(_whole(0, 1024), 1024)


class LoadConfigSchema(_Strict):
    contextLength = _whole(1, 2**31 - 1, "Tokens.")
    gpu = fields.Nested(GpuSchema)
    cpuThreads = _whole(1, 4096)
    ropeFrequencyBase = _number(0)
    ropeFrequencyScale = _number(0)
    evalBatchSize = _whole(1, 2**31 - 1, "Prompt tokens processed at once.")
    flashAttention = _flag()
    keepModelInMemory = _flag()
    tryMmap = _flag()
    useFp16ForKVCache = _flag()
    llamaKCacheQuantizationType = _cache_type("Quantization of the cached keys; false for none.")
    llamaVCacheQuantizationType = _cache_type("Quantization of the cached values; false for none.")
    offloadKVCacheToGpu = _flag()
    numExperts = _whole(0, 65_536, "Number of active experts of a mixture-of-experts model.")
    seed = _whole(-(2**31), 2**32 - 1)
    gpuStrictVramCap = _flag()
    numParallelSessions = _whole(1, 1024)
    useUnifiedKvCache = _flag()
    numCpuExpertLayersRatio = _ratio("The share of expert layers on the CPU.")


class DefaultInferenceSchema(_Strict):
    temperature = _number(0, 2)
    maxTokens = _whole(1, 2**31 - 1)
    topP = _number(0, 1)
    topK = _whole(0, 2**31 - 1)
    repeatPenalty = _number(0, 10)
    stopStrings = _Items(_text(), 64)
    stream = _flag()


class LoadSchema(_Strict):
    modelKey = _text("As `GET /admin/models` names it.", required=True)
    instanceId = _text("The identifier of the instance. LM Studio chooses one if it is absent.")
    loadConfig = fields.Nested(LoadConfigSchema)
    ttlSeconds = _whole(
        0, 10**9, "Idle time after which LM Studio unloads it; never if absent or 0."
    )
    defaultInference = fields.Nested(DefaultInferenceSchema)
    activate = _flag("Whether it becomes the active model; true if absent.")


class UnloadSchema(_Strict):
    modelKey = _text()
    instanceId = _text()

    @validates_schema
    def _name_one(self, data: Any, **kwargs: Any) -> None:
        if not data.get("modelKey") and not data.get("instanceId"):
            raise ValidationError("Give modelKey or instanceId.", field_name="modelKey")


class ActivateSchema(_Strict):
    modelKey = _text(required=True)
    instanceId = _text()
    defaultInference = fields.Nested(DefaultInferenceSchema)


class DeactivateSchema(_Strict):
    """Takes no fields; any field is an error."""


def parse(schema: Schema, body: Any) -> dict[str, Any]:
    """Return the validated body; BadRequest with a detail (path and message) for each problem,
    at most MAX_DETAILS of them."""
    try:
        loaded: dict[str, Any] = schema.load(body)
    except ValidationError as error:
        details = _details(error.messages, [])[:MAX_DETAILS]
        raise BadRequest("Validation failed", details=details) from None
    return loaded


def _details(messages: Any, path: list[Any]) -> list[dict[str, Any]]:
    if isinstance(messages, dict):
        found = []
        for name, inner in messages.items():
            found += _details(inner, path if name == "_schema" else [*path, name])
        return found
    return [{"path": path, "message": message} for message in messages]
