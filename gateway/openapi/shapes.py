"""The shapes of the gateway's own JSON responses, as JSON Schema.

They are written in a short notation (:func:`_shape`): ``"integer"`` is a type, ``"Model"`` another
shape, ``"time"`` a timestamp, a trailing ``?`` allows null, ``["string"]`` is a list, and a
dictionary is JSON Schema as is.
"""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]


def _shape(notation: str | list[str] | Json) -> Json:
    """The JSON Schema of a member."""
    if isinstance(notation, dict):
        return notation
    if isinstance(notation, list):
        return {"type": "array", "items": _shape(notation[0])}
    name = notation.removesuffix("?")
    if name != notation:
        return {"anyOf": [_shape(name), {"type": "null"}]}
    if name == "time":
        return {"type": "string", "format": "date-time"}
    return {"$ref": f"#/components/schemas/{name}"} if name[0].isupper() else {"type": name}


def _object(optional: Json | None = None, /, **required: Any) -> Json:
    """The JSON Schema of an object with these members."""
    members = required | (optional or {})
    properties = {name: _shape(notation) for name, notation in members.items()}
    return {"type": "object", "properties": properties, "required": list(required)}


def _one_of(*values: str) -> Json:
    return {"enum": list(values)}


#: LM Studio describes models with more members than the API promises.
_AND_MORE = {"additionalProperties": True}
_KIND = {"type": "string", "description": "`llm`, `embedding` or another type of LM Studio."}
_ACTIVE = {
    "modelKey": "string",
    "instanceId": "string?",
    "defaultInference": "DefaultInference",
    "type": _one_of("llm", "embedding"),
}
_DETAIL = {"path": {"type": "array", "items": {"type": ["string", "integer"]}}, "message": "string"}

#: Name → JSON Schema.
SHAPES: dict[str, Json] = {
    # /admin
    "Listing": _object(loaded=["Instance"], downloaded=["Model"], active="ListedActive?"),
    "Instance": _object(
        {"contextLength": "integer"},
        path="string",
        modelKey="string",
        identifier="string",
        type=_KIND,
        ttlMs="integer?",
    )
    | _AND_MORE,
    "Model": _object(
        {
            "maxContextLength": "integer",
            "vision": "boolean",
            "trainedForToolUse": "boolean",
            "format": "string",
            "quantization": {"type": "object"} | _AND_MORE,
            "architecture": "string",
            "paramsString": "string",
            "displayName": "string",
        },
        path="string",
        modelKey="string",
        size="integer?",
        type=_KIND,
    )
    | _AND_MORE,
    "ListedActive": _object(**_ACTIVE, loaded="boolean"),
    "Loaded": _object(
        status=_one_of("loaded"),
        modelKey="string",
        instanceId="string",
        activated="boolean",
        totalTimeMs="integer",
        message="string",
        appliedConfig="LoadConfig",
        warnings=["string"],
    ),
    "Unloaded": _object(
        status=_one_of("unloaded"),
        modelKey="string",
        instanceId="string",
        totalTimeMs="integer",
        message="string",
    ),
    "Activated": _object(
        status=_one_of("activated"),
        modelKey="string",
        instanceId="string?",
        defaultInference="DefaultInference",
        message="string",
    ),
    "Deactivated": _object(status=_one_of("deactivated")),
    # /debug
    "Status": _object(
        {"recentRequests": ["Completed"], "error": "string"},
        status=_one_of("idle", "loading_model", "processing_inference", "error"),
        currentOperation="Running?",
        activeModel="Active?",
        inFlight=["Running"],
        totalRequests="integer",
        totalErrors="integer",
    ),
    "Active": _object(**_ACTIVE),
    "Running": _object(
        {
            "requestId": "string",
            "method": "string",
            "path": "string",
            "model": "string",
            "stream": "boolean",
            "client": "string",
            "chunks": "integer",
            "modelKey": "string",
            "instanceId": "string?",
            "loadConfig": "LoadConfig",
        },
        operation=_one_of("inference", "model_load"),
        startedAt="time",
        elapsedMs="integer",
    ),
    "Completed": _object(
        timestamp="time",
        requestId="string",
        status="integer",
        totalTimeMs="number",
        ttftMs="number?",
        tokenUsage=_object(
            promptTokens="integer?", completionTokens="integer?", totalTokens="integer?"
        ),
        tokensPerSec="number?",
        cancelled="boolean",
    ),
    "Metrics": _object(
        modelInfo="Active?",
        performance="Performance",
        recentActivity=_object(last10Requests=["Completed"]),
        system=_object(
            uptime="number",
            uptimeFormatted="string",
            memoryUsage=_object(rss="integer"),
            pythonVersion="string",
            platform="string",
            workers="integer",
        ),
        currentOperation="Running?",
    ),
    "Performance": _object(
        totalRequests="integer",
        totalErrors="integer",
        errorRate="number",
        recentRequestCount="integer",
        completedRequestCount="integer",
        avgResponseTimeMs="number?",
        minResponseTimeMs="number?",
        maxResponseTimeMs="number?",
        medianResponseTimeMs="number?",
        p95ResponseTimeMs="number?",
        avgTtftMs="number?",
        avgTokensPerSec="number?",
        totalTokensProcessed="integer",
        requestsWithTokenData="integer",
        tokenStats=_object(
            promptTokens="integer",
            completionTokens="integer",
            totalTokens="integer",
            avgPromptTokens="number?",
            avgCompletionTokens="number?",
        ),
    ),
    # /health
    "Health": _object(
        status=_one_of("ok", "degraded"),
        timestamp="time",
        uptime="number",
        version="string",
        commit="string?",
        lmstudio="Connection",
        state="Connection",
    ),
    "Ready": _object(ready="boolean", lmstudio="Connection"),
    "Connection": _object({"error": "string"}, connected="boolean"),
    # errors by dialect
    "AdminError": _object(
        {"details": {"type": "array", "items": _object(**_DETAIL)}},
        error="string",
        requestId="string",
    ),
    "OpenAIError": _object(
        error=_object(message="string", type="string", param="string?", code="string?")
    ),
    "AnthropicError": _object(
        type=_one_of("error"), error=_object(type="string", message="string")
    ),
}
