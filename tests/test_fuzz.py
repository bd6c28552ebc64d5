"""Send generated requests to every endpoint: no 500, no traceback, no answer that is not described.

There is no basic authentication, so that requests reach the endpoints; `test_http.py` tests
authentication.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from tests.conftest import CAPTURES, capture
from tests.test_http import ENDPOINTS, Served

pytestmark = pytest.mark.slow

SETTINGS = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
CHECKED = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    unsupported_method,
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("fuzzed"), ML_BACKEND_ALLOWED_IMAGE_HOSTS="127.0.0.1")
    # A known project with enough annotations for a training gets other answers than refusals.
    served.post("/setup", capture("POST_setup"))
    served.post("/webhook", capture("POST_webhook_ANNOTATIONS_CREATED"))
    yield served
    served.close()


@pytest.fixture(scope="module")
def described(served: Served) -> Any:
    return schemathesis.openapi.from_wsgi("/openapi.json", served.app)


def test_openapi_names_every_endpoint(served: Served) -> None:
    answer = served.client.get("/openapi.json")
    assert answer.json is not None
    found = {(method.upper(), path) for path, of in answer.json["paths"].items() for method in of}
    assert found == ENDPOINTS


@pytest.mark.parametrize(("method", "path"), sorted(ENDPOINTS))
def test_endpoint_generated_request_answers_as_described(
    described: Any, method: str, path: str
) -> None:
    operation = described[path][method.lower()]
    # Requests that fit the description, and requests that do not.
    for mode in GenerationMode if operation.body else [GenerationMode.POSITIVE]:

        @SETTINGS
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: schemathesis.Case[Any]) -> None:
            answer = case.call_and_validate(checks=CHECKED)
            assert "Traceback" not in answer.text

        ask()


_ANYTHING = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=8),
        st.sampled_from([2**63, -(2**63), 10**400, -1, 0, "", "\x00", "\ud800", "NaN", [], {}]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
_RECORDED = sorted(path.stem for path in CAPTURES.glob("POST_*.json"))


def _places(content: Any, where: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield the path of every value in a body."""
    inner = content.items() if isinstance(content, dict) else enumerate(content)
    for name, value in inner:
        yield (*where, name)
        if isinstance(value, dict | list):
            yield from _places(value, (*where, name))


@settings(SETTINGS, max_examples=300)
@given(data=st.data())
def test_recorded_request_changed_at_random_is_taken_or_refused(
    served: Served, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(_RECORDED))
    body = capture(name)
    for _ in range(data.draw(st.integers(1, 3))):
        *outer, last = data.draw(st.sampled_from(sorted(_places(body), key=repr)))
        inner: Any = body
        for step in outer:
            inner = inner[step]
        inner[last] = data.draw(_ANYTHING)
    path = "/" + name.split("_")[1]
    # `json.dumps` writes NaN and infinities, which are not JSON, as careless clients do.
    answer = served.client.post(path, data=json.dumps(body), content_type="application/json")
    assert answer.status_code < 500, answer.text
    assert answer.json is not None
    if answer.status_code >= 400:
        assert set(answer.json) == {"error"}
        assert "Traceback" not in answer.text


def test_server_after_all_generated_requests_still_answers(served: Served) -> None:
    """Check, after the tests above, that what they stored does no harm."""
    assert served.client.get("/health").status_code == 200
    assert served.metric("ml_backend_webhooks_total") > 100
    assert served.version() == "untrained"
    assert served.post("/webhook", capture("POST_webhook_START_TRAINING")).status_code == 200
