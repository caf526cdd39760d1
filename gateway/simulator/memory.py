"""The models that are loaded: loading with progress, naming, idle expiry, unloading."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import gevent

from gateway.simulator.catalogue import MODELS, JsonObject, Model, apply_fields
from gateway.simulator.faults import Faults

#: A model loaded by a request that named it expires after an hour (LM Studio's default), in ms.
JUST_IN_TIME_TTL_MS = 3_600_000
_JUST_IN_TIME_SECONDS = 0.05


class Refusal(Exception):
    """LM Studio's error object, as ``rpcError`` and ``channelError`` carry it.

    ``display`` becomes ``displayData``; its ``code`` is what clients classify on.
    """

    def __init__(
        self, title: str, *, cause: str | None = None, suggestion: str | None = None, **display: Any
    ) -> None:
        super().__init__(title)
        self.title = title
        self.cause = cause
        self.suggestion = suggestion
        self.display = display

    def as_json(self) -> JsonObject:
        """Return ``{title, rootTitle, cause?, suggestion?, displayData?}``."""
        body: JsonObject = {"title": self.title, "rootTitle": self.title}
        if self.cause:
            body["cause"] = self.cause
        if self.suggestion:
            body["suggestion"] = self.suggestion
        if self.display:
            body["displayData"] = self.display
        return body


@dataclass
class LoadRequest:
    """A load as it was asked for; ``namespace`` is ``llm`` or ``embedding``."""

    namespace: str
    model_key: str
    fields: list[tuple[str, Any]] = field(default_factory=list)
    identifier: str | None = None
    ttl_ms: int | None = None


@dataclass
class LoadAttempt:
    """What ``GET /_simulator/state`` tells of one load; ``progress`` is 0 to 1."""

    modelKey: str
    identifier: str | None
    namespace: str
    fields: JsonObject
    ignored: JsonObject
    ttlMs: int | None
    outcome: str = "loading"
    progress: float = 0.0


@dataclass
class Instance:
    """A loaded model; ``last_used`` is ``time.time()`` of its last inference, if any."""

    model: Model
    identifier: str
    ttl_ms: int | None
    config: JsonObject
    ignored: JsonObject
    reference: str = field(default_factory=lambda: uuid4().hex)
    loaded: float = field(default_factory=time.time)
    last_used: float | None = None
    busy: int = 0

    @property
    def context_length(self) -> int:
        """The applied context length in tokens."""
        return int(self.config[f"{self.model.type}.load.contextLength"])

    def info(self) -> JsonObject:
        """Return the model's fields and those of the instance, as ``listLoaded`` gives them."""
        return self.model.info() | {
            "identifier": self.identifier,
            "instanceReference": self.reference,
            "contextLength": self.context_length,
            "ttlMs": self.ttl_ms,
            "lastUsedTime": None if self.last_used is None else int(self.last_used * 1000),
        }

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep the instance from expiring while it works, and note when it last did."""
        self.busy += 1
        try:
            yield
        finally:
            self.busy -= 1
            self.last_used = time.time()

    def idle_left(self) -> float:
        """Return the seconds until this instance has been idle for its TTL."""
        ttl = (self.ttl_ms or 0) / 1000
        return ttl if self.busy else (self.last_used or self.loaded) + ttl - time.time()


def resolve(namespace: str, model_key: str) -> Model:
    """Find a downloaded model for a namespace; a :class:`Refusal` says why there is none."""
    model = MODELS.get(model_key)
    if model is None:
        raise Refusal(
            f"Cannot find a model with path or key: {model_key}",
            suggestion="Use `lms ls` to see the models you have downloaded.",
            code="generic.pathNotFound",
            path=model_key,
            availablePathsSample=list(MODELS)[:5],
            totalModels=len(MODELS),
        )
    if model.type != namespace:
        raise Refusal(
            f"Model {model_key} is of the type {model.type}, expected {namespace}",
            code="generic.domainMismatch",
            path=model_key,
            actualDomain=model.type,
            expectedDomain=namespace,
        )
    return model


class Memory:
    """All loaded instances, and the record of every attempt to load one."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._reserved: set[str] = set()
        self.instances: dict[str, Instance] = {}
        self.attempts: deque[LoadAttempt] = deque(maxlen=5000)

    def of(self, namespace: str) -> list[Instance]:
        """Return the loaded instances of a namespace, oldest first."""
        return [one for one in self.instances.values() if one.model.type == namespace]

    def load(
        self,
        request: LoadRequest,
        on_resolved: Callable[[Model, str], object] = lambda model, identifier: None,
        on_progress: Callable[[float], object] = lambda progress: None,
        seconds: float | None = None,
    ) -> Instance:
        """Load a model in the calling greenlet and return its instance.

        Killing that greenlet cancels the load. A :class:`Refusal` tells why it failed.
        """
        attempt = self._note(request)
        try:
            model = resolve(request.namespace, request.model_key)
            applied, attempt.ignored = apply_fields(model, request.fields)
            with self._reservation(model, request.identifier) as identifier:
                attempt.identifier = identifier
                on_resolved(model, identifier)
                asked = self._faults.switches.load_ms / 1000 or model.load_seconds
                duration = asked if seconds is None else seconds
                self._fill(attempt, model, duration, on_progress)
                instance = Instance(model, identifier, request.ttl_ms, applied, attempt.ignored)
                self.instances[identifier] = instance
        except Refusal:
            attempt.outcome = "failed" if attempt.outcome == "loading" else attempt.outcome
            raise
        except BaseException:  # the greenlet was killed, or nobody is left to hear of progress
            attempt.outcome = "cancelled"
            raise
        attempt.outcome = "loaded"
        if instance.ttl_ms is not None:
            gevent.spawn(self._expire, instance)
        return instance

    def load_just_in_time(self, model: Model) -> Instance:
        """Load with default settings because a request named the model, as LM Studio does."""
        request = LoadRequest(model.type, model.key, ttl_ms=JUST_IN_TIME_TTL_MS)
        return self.load(request, seconds=_JUST_IN_TIME_SECONDS)

    def unload(self, namespace: str, identifier: str) -> None:
        """Forget an instance, or refuse with ``generic.identifierNotFound``."""
        if identifier not in {one.identifier for one in self.of(namespace)}:
            raise self.not_found(namespace, "generic.identifierNotFound", identifier=identifier)
        del self.instances[identifier]

    def not_found(self, namespace: str, code: str, **details: Any) -> Refusal:
        """Return the refusal for something that is not loaded in this namespace."""
        loaded = [one.identifier for one in self.of(namespace)]
        wanted = details.get("identifier") or details.get("query", {}).get("identifier")
        return Refusal(
            f"Cannot find a loaded model matching: {wanted}",
            suggestion="Use `lms ps` to see the loaded models.",
            code=code,
            loadedModelsSample=loaded[:5],
            totalLoadedModels=len(loaded),
            **details,
        )

    def reset(self) -> None:
        """Unload everything, break off running loads and forget the attempts."""
        for attempt in self.attempts:
            if attempt.outcome == "loading":
                attempt.outcome = "cancelled"
        self.attempts.clear()
        self.instances.clear()

    def _note(self, request: LoadRequest) -> LoadAttempt:
        attempt = LoadAttempt(
            request.model_key, request.identifier, request.namespace, dict(request.fields), {},
            request.ttl_ms,
        )  # fmt: skip
        self.attempts.append(attempt)
        return attempt

    @contextmanager
    def _reservation(self, model: Model, wanted: str | None) -> Iterator[str]:
        """Hold an identifier during the load: the wanted one, else ``key``, ``key:2``, …"""
        taken = self._reserved | set(self.instances)
        if wanted in taken:
            raise Refusal(f'Model with identifier "{wanted}" already exists')
        identifier, number = wanted or model.key, 1
        while identifier in taken:
            number += 1
            identifier = f"{model.key}:{number}"
        self._reserved.add(identifier)
        try:
            yield identifier
        finally:
            self._reserved.discard(identifier)

    def _fill(
        self,
        attempt: LoadAttempt,
        model: Model,
        seconds: float,
        on_progress: Callable[[float], object],
    ) -> None:
        """Let the time of a load pass; one that fails does so a quarter of the way."""
        cause = self._faults.switches.fail_loads or model.shortage
        for step in range(1, model.load_steps + 1):
            gevent.sleep(seconds / model.load_steps)
            if attempt.outcome == "cancelled":
                raise Refusal("Failed to load model", cause="Operation canceled.")
            if cause and step > model.load_steps / 4:
                raise Refusal("Failed to load model", cause=cause)
            attempt.progress = step / model.load_steps
            on_progress(attempt.progress)

    def _expire(self, instance: Instance) -> None:
        while self.instances.get(instance.identifier) is instance:
            left = instance.idle_left()
            if left <= 0:
                del self.instances[instance.identifier]
            else:
                gevent.sleep(left)
