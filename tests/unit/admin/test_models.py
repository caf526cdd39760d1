"""Model management over a link and a store that fail."""

from __future__ import annotations

from typing import Any, cast

import gevent
import pytest

from gateway.admin import Models
from gateway.errors import BadGateway
from gateway.lmstudio import LinkLost, ServerRefused
from gateway.state import Active, StoreError

MODEL = {"type": "llm", "modelKey": "m", "path": "p/m.gguf"}
VECTORS = {"type": "embedding", "modelKey": "vectors"}


class FakeLink:
    """Answers from lists; an exception in place of an answer is raised."""

    def __init__(self, **answers: list[Any]) -> None:
        self.answers = answers
        self.unloaded: list[str] = []

    def is_connected(self) -> bool:
        return True

    def downloaded(self) -> Any:
        return self._next("downloaded")

    def loaded(self, namespace: str) -> Any:
        return self._next("loaded") if namespace == "llm" else []

    def load(self, *arguments: Any) -> str:
        return str(self._next("load"))

    def load_config(self, namespace: str, identifier: str) -> Any:
        return []

    def unload(self, namespace: str, identifier: str) -> None:
        self.unloaded.append(identifier)

    def _next(self, name: str) -> Any:
        answer = self.answers[name].pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer() if callable(answer) else answer


class FakeStore:
    """Holds the active model, and fails with ``error``."""

    def __init__(self, active: Active | None = None, error: Exception | None = None) -> None:
        self.value, self.error = active, error

    def active(self) -> Active | None:
        return self.value

    def set_active(self, active: Active | None) -> None:
        if self.error:
            raise self.error
        self.value = active


def ignore(event: str, data: dict[str, Any]) -> None:
    pass


def models(link: FakeLink, store: FakeStore) -> Models:
    return Models(cast(Any, link), cast(Any, store))


def test_a_load_that_could_not_be_activated_succeeds_with_a_warning() -> None:
    link = FakeLink(downloaded=[[MODEL]], load=["m"])
    store = FakeStore(error=StoreError("The shared state is away."))
    result = models(link, store).load({"modelKey": "m"}, ignore)
    assert (result["status"], result["activated"]) == ("loaded", False)
    (warning,) = result["warnings"]
    assert "The shared state is away." in warning
    assert link.unloaded == []


@pytest.mark.parametrize(("others", "deactivated"), [([], True), ([{"modelKey": "m"}], False)])
def test_a_refused_question_after_an_unload_does_not_fail_it(
    others: list[Any], deactivated: bool
) -> None:
    loaded = [{"modelKey": "m", "identifier": "m"}, *(one | {"identifier": "n"} for one in others)]
    link = FakeLink(loaded=[loaded, ServerRefused("no", "")])
    store = FakeStore(Active("m", None, "llm"))
    result = models(link, store).unload({"modelKey": "m"}, ignore)
    assert (result["status"], link.unloaded) == ("unloaded", ["m"])
    assert (store.value is None) is deactivated


def test_an_activation_goes_by_the_type_that_lm_studio_reported_last() -> None:
    link = FakeLink(loaded=[[]], downloaded=[[VECTORS], LinkLost("away"), lambda: gevent.sleep(60)])
    store = FakeStore()
    managed = models(link, store)
    managed.listing()
    for _ in range(2):  # LM Studio is away, then frozen
        store.value = None
        managed.activate({"modelKey": "vectors"}, ignore)
        assert cast(Any, store.value).model_type == "embedding"


@pytest.mark.parametrize(
    ("failure", "reported"),
    [(ServerRefused("LM Studio's words", ""), "LM Studio's words"), (KeyError("x"), "log")],
)
def test_only_what_was_cancelled_is_reported_as_cancelled(
    failure: Exception, reported: str
) -> None:
    errors: list[str] = []
    link = FakeLink(downloaded=[[MODEL]], load=[failure])

    def emit(event: str, data: dict[str, Any]) -> None:
        if event == "error":
            errors.append(data["error"])

    with pytest.raises((BadGateway, KeyError)):
        models(link, FakeStore()).load({"modelKey": "m"}, emit)
    assert len(errors) == 1
    assert reported in errors[0]
