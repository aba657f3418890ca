"""The dashboard: who may what, what it shows, what it refuses, whom it tells."""

from __future__ import annotations

import http.server
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import pytest
from fastapi.routing import APIRoute
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from umbel.core import audit_log
from umbel.core.errors import InputError
from umbel.deploy.dashboard import app as module
from umbel.deploy.dashboard import guard
from umbel.deploy.dashboard.app import make_app
from umbel.deploy.dashboard.sessions import MOST_FAILURES, WINDOW, Sessions, Throttle
from umbel.deploy.dashboard.settings import Alerts, DashboardSettings, read_settings, require_safe
from umbel.deploy.dashboard.source import Source
from umbel.deploy.dashboard.users import ROLES, Users
from umbel.deploy.dashboard.watch import Watch
from umbel.deploy.jobs import Jobs

PASSWORD = "four words that fit"
ORIGIN = {"origin": "http://localhost"}

ROUTES = [
    (method, route)
    for router in module.ROUTERS
    for route in router.routes
    if isinstance(route, APIRoute)
    for method in sorted(route.methods)
]


class Site(NamedTuple):
    """The dashboard, a client for each role, and their forms' tokens."""

    clients: dict[str, TestClient]
    users: Users
    source: Source

    def form(self, role: str) -> dict[str, str]:
        page = self.clients[role].get("/account").text
        found = re.search(r'name="csrf" value="([0-9a-f]+)"', page)
        assert found
        return {"csrf": found.group(1)}


def client(application: Any) -> TestClient:
    return TestClient(
        application,
        base_url="http://localhost",
        follow_redirects=False,
        headers=ORIGIN,
        raise_server_exceptions=False,
    )


@pytest.fixture(scope="module")
def site(made: Any) -> Iterator[Site]:
    location = str(made.folder.store)
    source, users = Source(location, made.folder), Users(location)
    assert users.begin(made.folder.admin_file) is None
    users.set_password("admin", "admin", PASSWORD)
    for role in ("viewer", "operator"):
        users.add("admin", role, role, PASSWORD)
    application = make_app(source, users, ["localhost"], tls=False)
    clients = {"": client(application)}
    for role in ROLES:
        clients[role] = client(application)
        answer = clients[role].post("/login", data={"user": role, "password": PASSWORD})
        assert answer.status_code == 303
        cookie = answer.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=strict" in cookie
    yield Site(clients, users, source)
    source.store.close()


def filled(path: str) -> str:
    """A path with what does not exist in the place of its parameters."""
    return re.sub(r"{\w+}", "none", path)


def test_the_first_admin_has_the_password_that_init_showed(made: Any, tmp_path: Path) -> None:
    users = Users(str(tmp_path))
    assert users.begin(made.folder.admin_file) is None
    admin = users.check("admin", made.password)
    assert admin is not None
    assert admin.role == "admin"
    assert users.check("admin", made.password + "x") is None
    assert users.check("nobody", made.password) is None


def test_a_store_without_a_server_makes_a_password_once(tmp_path: Path) -> None:
    users = Users(str(tmp_path))
    password = users.begin(None)
    assert password is not None
    assert users.check("admin", password) is not None
    assert users.begin(None) is None


def test_a_lost_password_is_replaced_at_the_machine(tmp_path: Path) -> None:
    users = Users(str(tmp_path))
    old = users.begin(None)
    assert old is not None
    users.set_password("admin", "admin", PASSWORD)
    new = users.reset_admin()
    assert users.check("admin", PASSWORD) is None
    admin = users.check("admin", new)
    assert admin is not None
    assert admin.role == "admin"


def test_every_route_says_who_may_use_it() -> None:
    assert len(ROUTES) > 25
    for method, route in ROUTES:
        assert guard.needed(route.endpoint) in (*ROLES, guard.ANYBODY), (method, route.path)


OPEN = {("GET", "/healthz")}


# Those that begin and end sessions have tests of their own.
STAY = [(m, r) for m, r in ROUTES if r.path not in ("/login", "/logout")]


@pytest.mark.parametrize(("method", "route"), STAY, ids=lambda x: getattr(x, "path", x))
def test_each_role_reaches_what_it_may_and_nothing_else(
    site: Site, method: str, route: APIRoute
) -> None:
    needed = guard.needed(route.endpoint)
    is_open = (method, route.path) in OPEN
    assert is_open == (needed == guard.ANYBODY)
    path = filled(route.path)
    stranger = site.clients[""].request(method, path)
    if is_open:
        assert stranger.status_code == 200
        return
    assert stranger.status_code in (303, 401)
    if stranger.status_code == 303:
        assert stranger.headers["location"] == "/login"
    assert needed is not None
    for role in ROLES:
        data = site.form(role) if method == "POST" else None
        answer = site.clients[role].request(method, path, data=data)
        allowed = ROLES.index(role) >= ROLES.index(needed)  # type: ignore[arg-type]
        assert (answer.status_code != 403) == allowed, (role, answer.text[:200])
        assert answer.status_code < 500, answer.text[:500]


@pytest.mark.parametrize(
    ("method", "route"),
    [(m, r) for m, r in ROUTES if m == "POST" and r.path != "/login"],
    ids=lambda x: getattr(x, "path", x),
)
def test_nothing_changes_without_the_forms_own_token(
    site: Site, method: str, route: APIRoute
) -> None:
    path = filled(route.path)
    for data in ({}, {"csrf": "0" * 64}, {"csrf": "ü"}, site.form("viewer")):
        assert site.clients["admin"].post(path, data=data).status_code == 403
    right = site.form("admin")
    elsewhere = {"origin": "https://evil.example"}
    answer = site.clients["admin"].post(path, data=right, headers=elsewhere)
    assert answer.status_code == 403
    assert "another site" in answer.text


@pytest.mark.parametrize("path", ["/", "/login", "/static/umbel.css", "/api/runs", "/nothing"])
def test_every_answer_has_the_strict_headers(site: Site, path: str) -> None:
    for role in ("", "viewer"):
        headers = site.clients[role].get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["cache-control"] == "no-store"


def test_no_page_has_inline_code_style_or_another_host(site: Site, made: Any) -> None:
    pages = ["/", "/runs", f"/runs/{made.live}", f"/runs/{made.finished}", "/clients", "/models"]
    pages += ["/audit", "/users", "/account", f"/compare?run={made.finished}&run={made.other}"]
    for page in pages:
        text = site.clients["admin"].get(page).text
        assert "<h1>" in text
        assert not re.search(r"<script(?![^>]*\bsrc=\"/static/)", text), page
        assert not re.search(r"\son\w+=|\sstyle=|<style|javascript:", text), page
        assert not re.search(r"(src|href|action)=\"(https?:)?//", text), page
    for file in ("umbel.css", "umbel.js"):
        static = site.clients[""].get(f"/static/{file}").text
        assert "http://" not in static
        assert "https://" not in static
        assert "@import" not in static


def test_what_clients_say_is_text(site: Site, made: Any) -> None:
    page = site.clients["viewer"].get(f"/runs/{made.finished}").text
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(&#39;basel&#39;)&lt;/script&gt;" in page


def test_other_hosts_names_are_refused(site: Site) -> None:
    answer = site.clients["viewer"].get("/", headers={"host": "evil.example"})
    assert answer.status_code == 421
    own = {"host": "LOCALHOST:8480", "origin": "http://localhost:8480"}
    assert site.clients["viewer"].get("/", headers=own).status_code == 200


def test_guessing_is_slowed_down_and_noted(site: Site, made: Any) -> None:
    stranger = client(make_app(site.source, site.users, ["localhost"], tls=False))
    wrong = {"user": "admin", "password": "wrong"}
    answers = [stranger.post("/login", data=wrong).status_code for _ in range(MOST_FAILURES + 1)]
    assert answers == [401] * MOST_FAILURES + [429]
    right = stranger.post("/login", data={"user": "admin", "password": PASSWORD})
    assert right.status_code == 429
    assert 0 < int(right.headers["retry-after"]) <= WINDOW + 1
    lines, broken = site.source.audit()
    assert broken == ""
    assert sum(line.event == "login refused" for line in lines) >= MOST_FAILURES


def test_the_door_opens_again_after_the_window() -> None:
    now = 0.0
    throttle = Throttle(lambda: now)
    for _ in range(MOST_FAILURES):
        assert throttle.wait("a") == 0
        throttle.failed("a")
    assert throttle.wait("a") == pytest.approx(WINDOW)
    assert throttle.wait("b") == 0
    now = WINDOW + 1
    assert throttle.wait("a") == 0


def test_a_changed_ended_or_old_cookie_is_nobodys() -> None:
    now = 1000.0
    sessions = Sessions(lambda: now)
    session, cookie = sessions.begin("eve", "stamp")
    assert sessions.read(cookie) == session
    body, _, signature = cookie.partition(".")
    other = "1" if signature.endswith("0") else "0"
    changed = [f"{body}x.{signature}", f"{body}.{signature[:-1]}{other}"]
    changed += [f"{body}.ü", body, ".", ""]
    assert [sessions.read(c) for c in changed] == [None] * len(changed)
    assert Sessions(lambda: now).read(cookie) is None
    sessions.end(session)
    assert sessions.read(cookie) is None
    _, cookie = sessions.begin("eve", "stamp")
    now += 9 * 3600
    assert sessions.read(cookie) is None


def test_a_new_password_ends_sessions_and_a_removed_user_its_tokens(site: Site) -> None:
    users = site.users
    users.add("admin", "short", "viewer", PASSWORD)
    guest = client(make_app(site.source, users, ["localhost"], tls=False))
    guest.post("/login", data={"user": "short", "password": PASSWORD})
    assert guest.get("/").status_code == 200
    users.set_password("admin", "short", PASSWORD + "!")
    assert guest.get("/").status_code == 303
    token = users.make_token("short", "x")
    bearer = {"authorization": f"Bearer {token}"}
    assert site.clients[""].get("/api/runs", headers=bearer).status_code == 200
    assert site.clients[""].get("/api/audit", headers=bearer).status_code == 403
    users.remove("admin", "short")
    assert site.clients[""].get("/api/runs", headers=bearer).status_code == 401


def test_somebody_stays_admin(site: Site) -> None:
    with pytest.raises(InputError, match="nobody would be admin"):
        site.users.remove("admin", "admin")
    with pytest.raises(InputError, match="nobody would be admin"):
        site.users.set_role("admin", "admin", "viewer")
    assert site.users.get("admin") is not None
    with pytest.raises(InputError, match="12 to"):
        site.users.add("admin", "weak", "viewer", "short")


def test_logout_ends_the_session_for_good(site: Site) -> None:
    guest = client(make_app(site.source, site.users, ["localhost"], tls=False))
    guest.post("/login", data={"user": "viewer", "password": PASSWORD})
    cookie = guest.cookies["umbel"]
    form = re.search(r'name="csrf" value="(\w+)"', guest.get("/").text)
    assert form
    assert guest.post("/logout", data={"csrf": form.group(1)}).status_code == 303
    assert guest.get("/", headers={"cookie": f"umbel={cookie}"}).status_code == 303


def test_a_large_body_is_refused(site: Site) -> None:
    answer = site.clients[""].post("/login", content=b"x" * (guard.LARGEST_BODY + 1))
    assert answer.status_code == 413


def test_orders_reach_the_queue_and_the_audit_log(site: Site, made: Any) -> None:
    operator, jobs = site.clients["operator"], Jobs(made.folder.jobs_database)
    path = f"/jobs/{made.job.id}/pause"
    assert operator.post(path, data=site.form("operator")).status_code == 303
    assert jobs.get(made.job.id).wanted == "pause"
    jobs.change(made.job.id, wanted="")
    events = [e["event"] for e in audit_log.read(made.folder.audit_file)]
    assert "pause ordered" in events
    assert "operator" in site.clients["operator"].get("/audit").text


def test_a_run_file_is_submitted_and_one_that_names_code_is_not(site: Site, made: Any) -> None:
    operator, jobs = site.clients["operator"], Jobs(made.folder.jobs_database)
    before = len(jobs.list())
    text = '[data]\nname = "npz"\n\n[task]\nkind = "classification"\n'
    form = site.form("operator")
    assert operator.post("/submit", data={**form, "text": text}).status_code == 303
    assert len(jobs.list()) == before + 1
    evil = text.replace('"classification"', '"os:system"')
    answer = operator.post("/submit", data={**form, "text": evil})
    assert answer.status_code == 403
    assert "code or a file of this machine" in answer.text
    assert operator.post("/submit", data={**form, "text": "not toml ["}).status_code == 400
    assert len(jobs.list()) == before + 1
    jobs.want(jobs.list()[-1], "stop")


def test_a_model_is_downloaded_by_its_runs_id(site: Site, made: Any) -> None:
    page = site.clients["operator"].get("/models").text
    answer = site.clients["operator"].get(f"/models/{made.finished}")
    path = made.folder.store / made.finished / "model.safetensors"
    assert answer.content == path.read_bytes()
    assert answer.headers["x-sha256"] in page
    assert "attachment" in answer.headers["content-disposition"]
    for name in ("../../keys/authority.key", "..%2F..%2Fadmin.json", made.live):
        assert site.clients["operator"].get(f"/models/{name}").status_code in (400, 404)
    assert site.clients["viewer"].get(f"/models/{made.finished}").status_code == 403


def test_pages_show_what_the_store_has(site: Site, made: Any) -> None:
    viewer = site.clients["viewer"]
    run = viewer.get(f"/runs/{made.finished}").text
    assert "8 of 8" in run
    assert run.count('class="cell failed"') == 8
    assert "basel, round 5: no reply within 60 s" in run or "cork, round 5" in run
    assert "3.6 of 4" in run
    assert "quorum missed: 1 of 2" in run
    assert "900" in run or "1.8 kB" in run
    clients = viewer.get("/clients").text
    assert all(name in clients for name in ("aarhus", "basel", "cork"))
    assert "umbel 0.1.0" in clients
    compared = viewer.get(f"/compare?run={made.finished}&run={made.other}").text
    assert "run.name" in compared


@pytest.mark.parametrize("state", ["paused", "stopped"])
def test_what_was_ordered_is_not_called_an_accident(made: Any, tmp_path: Path, state: Any) -> None:
    made = type(made)(tmp_path / "server")  # of its own
    made.store.finish(made.live, "interrupted")
    jobs, source = Jobs(made.folder.jobs_database), Source(str(made.folder.store), made.folder)
    assert source.run(made.live).status == "interrupted"  # and the queue says that it runs
    jobs.change(made.job.id, error="not at this hour; trying again")
    assert source.run(made.live).status == "queued"
    jobs.change(made.job.id, state=state)
    statuses = {entry.run_id: entry.status for entry in source.runs()}
    assert statuses == {made.live: state, made.other: "failed", made.finished: "finished"}
    made.store.close()


def test_the_api_gives_the_same_as_json(site: Site, made: Any) -> None:
    viewer = site.clients["viewer"]
    runs = viewer.get("/api/runs").json()["runs"]
    assert {made.finished, made.other, made.live} == {r["run_id"] for r in runs}
    found = viewer.get(f"/api/runs/{made.finished}?after=6").json()
    assert [r["round"] for r in found["history"]] == [7, 8]
    assert found["privacy"]["limit"] == 4.0
    assert len(found["sha256"]) == 64
    kinds = {a["kind"] for a in viewer.get("/api/alerts").json()["alerts"]}
    assert {"not-finite", "quorum-missed", "budget", "run-failed"} <= kinds
    assert viewer.get("/api/runs/none").json()["error"]["message"]


def test_prometheus_reads_the_figures(site: Site, made: Any) -> None:
    text = site.clients["viewer"].get("/metrics").text
    found = {
        (sample.name, sample.labels.get("run", ""), sample.labels.get("client", "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert found["umbel_run_rounds_done", made.finished, ""] == 8
    assert found["umbel_epsilon", made.finished, ""] == pytest.approx(3.6)
    assert found["umbel_client_failures_total", "", "basel"] >= 1
    rules = (Path(module.__file__).parents[1] / "monitoring" / "alerts.yml").read_text()
    board = (Path(module.__file__).parents[1] / "monitoring" / "grafana.json").read_text()
    names = {family.name for family in text_string_to_metric_families(text)}
    for used in set(re.findall(r"umbel_\w+", rules + board)):
        assert used.removesuffix("_total") in names, used
    json.loads(board)


def test_an_alert_is_told_once_and_a_broken_webhook_stops_nothing(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[dict[str, Any]] = []

    class Hook(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(500 if len(told) > 1 else 200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            return

    server = http.server.HTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/"
    watch = Watch(site.source, Alerts(webhook=address))
    first = watch.look()
    assert {a.kind for a in first} >= {"not-finite", "quorum-missed", "budget"}
    assert len(told) == 1
    assert {a["kind"] for a in told[0]["alerts"]} == {a.kind for a in first}
    assert watch.look() == []
    assert len(told) == 1
    Watch(site.source, Alerts(webhook=address)).look()  # is answered with 500
    server.shutdown()
    server.server_close()
    Watch(site.source, Alerts(webhook=address)).look()  # nobody is there
    assert sum("was not delivered" in r.message for r in caplog.records) == 2


def test_without_tls_it_listens_to_this_machine_alone(tmp_path: Path) -> None:
    require_safe(DashboardSettings())
    require_safe(DashboardSettings(listen="::1"))
    with pytest.raises(InputError, match="without TLS"):
        require_safe(DashboardSettings(listen="0.0.0.0"))
    (tmp_path / "dashboard.toml").write_text(
        'listen = "0.0.0.0"\ncertificate = "c.pem"\nkey = "k.pem"\nhosts = ["fed.example.org"]\n'
        '[alerts]\nwebhook = "https://hooks.example.org/x"\n'
    )
    found = read_settings(tmp_path)
    require_safe(found)
    assert "fed.example.org" in found.names()


def test_over_tls_the_cookie_is_for_tls_alone(site: Site) -> None:
    guest = TestClient(
        make_app(site.source, site.users, ["localhost"], tls=True),
        base_url="https://localhost",
        headers={"origin": "https://localhost"},
        follow_redirects=False,
    )
    answer = guest.post("/login", data={"user": "viewer", "password": PASSWORD})
    assert answer.headers["set-cookie"].startswith("__Host-umbel=")
    assert "Secure" in answer.headers["set-cookie"]
    assert "max-age" in answer.headers["strict-transport-security"]
    assert guest.get("/").status_code == 200


def test_a_store_that_breaks_is_said_in_a_line(tmp_path: Path) -> None:
    users, source = Users(str(tmp_path)), Source(str(tmp_path))
    password = users.begin(None)
    guest = client(make_app(source, users, ["localhost"], tls=False))
    guest.post("/login", data={"user": "admin", "password": password})
    assert "no runs yet" in guest.get("/").text
    missing = guest.get("/runs/none")
    assert (missing.status_code, "Traceback" in missing.text) == (400, False)
    for file in tmp_path.glob("umbel.db*"):
        file.write_bytes(b"no database" * 1000)
    for opened in (users._database, source._database, source.store):
        opened.close()
    for path in ("/", "/login", "/api/runs"):
        broken = guest.get(path)
        assert broken.status_code == 503
        assert "damaged" in broken.text


TEXT = st.text(max_size=40)


@settings(max_examples=120)
@given(
    place=st.integers(0, len(STAY) - 1),
    words=st.lists(TEXT, min_size=3, max_size=3),
    query=st.dictionaries(st.sampled_from(["run", "after", "x"]), TEXT, max_size=3),
    form=st.dictionaries(
        st.sampled_from(["text", "sites", "user", "role", "password", "label", "order", "new"]),
        TEXT,
        max_size=4,
    ),
    role=st.sampled_from(["", *ROLES]),
)
def test_whatever_is_sent_nothing_breaks_and_nobody_gets_past(
    site: Site,
    place: int,
    words: list[str],
    query: dict[str, str],
    form: dict[str, str],
    role: str,
) -> None:
    method, route = STAY[place]
    parts = iter(words)
    path = re.sub(r"{\w+}", lambda _: quote(next(parts), safe=""), route.path)
    data = {**form, **(site.form(role) if role else {})} if method == "POST" else None
    answer = site.clients[role].request(method, path, params=query, data=data)
    assert answer.status_code < 500, (method, path, answer.text[:300])
    needed = guard.needed(route.endpoint)
    if role == "" and needed != guard.ANYBODY:
        assert answer.status_code >= 300, (method, path)


@settings(max_examples=60)
@given(
    headers=st.dictionaries(
        st.sampled_from(["cookie", "authorization", "origin", "host", "x-csrf-token", "accept"]),
        st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60),
        max_size=4,
    )
)
def test_no_header_lets_a_stranger_in(site: Site, headers: dict[str, str]) -> None:
    for method, path in (("GET", "/api/runs"), ("GET", "/users"), ("POST", "/users")):
        answer = site.clients[""].request(method, path, headers=headers)
        assert 300 <= answer.status_code < 500
