"""The dashboard's API, tried by its own description: whatever is sent, it holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import schemathesis
from hypothesis import given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.schemas import APIOperation
from starlette.testclient import TestClient

from umbel.deploy.dashboard.app import make_app
from umbel.deploy.dashboard.source import Source
from umbel.deploy.dashboard.users import Users

OURS = {"/api/openapi.json", "/api/runs", "/api/jobs/{job_id}/{order}", "/metrics"}


class Api(NamedTuple):
    """The application, and a token for each of two roles."""

    application: Any
    tokens: dict[str, str]

    def client(self, role: str = "") -> TestClient:
        headers = {"authorization": f"Bearer {self.tokens[role]}"} if role else {}
        return TestClient(
            self.application,
            base_url="http://localhost",
            headers=headers,
            follow_redirects=False,
            raise_server_exceptions=False,
        )


@pytest.fixture(scope="module")
def api(made: Any) -> Iterator[Api]:
    location = str(made.folder.store)
    source, users = Source(location, made.folder), Users(location)
    users.begin(made.folder.admin_file)
    tokens = {}
    for role in ("viewer", "operator"):
        users.add("admin", f"api-{role}", role, "four words that fit")
        tokens[role] = users.make_token(f"api-{role}", "test")
    yield Api(make_app(source, users, ["localhost"], tls=False), tokens)
    source.store.close()


def test_who_may_not_look_is_not_told_what_there_is(api: Api) -> None:
    assert api.client().get("/api/openapi.json").status_code == 401
    table = api.client("viewer").get("/api/openapi.json").json()
    assert table["paths"].keys() >= OURS


@pytest.mark.parametrize("role", ["", "viewer", "operator"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_its_own_description_breaks_nothing(
    api: Api, operations: list[APIOperation], role: str, data: st.DataObject
) -> None:
    operation = data.draw(st.sampled_from(operations), label="operation")
    mode = data.draw(st.sampled_from([GenerationMode.POSITIVE, GenerationMode.NEGATIVE]))
    case = data.draw(operation.as_strategy(mode))
    request = case.as_transport_kwargs("http://localhost")
    answer = api.client(role).request(**request)
    assert answer.status_code < 500, (operation.label, answer.text[:300])
    if not role:
        assert answer.status_code >= 400, operation.label
    if role == "viewer" and operation.method.lower() == "post":
        assert answer.status_code >= 400, operation.label


@pytest.fixture(scope="module")
def operations(api: Api) -> list[APIOperation]:
    table = api.client("viewer").get("/api/openapi.json").json()
    found = [one.ok() for one in schemathesis.openapi.from_dict(table).get_all_operations()]
    assert len(found) > 8
    return found
