"""The pages need nothing from other servers, run no script but their own, and open nothing that was closed."""

import asyncio
import base64
import hashlib
import json
import re

import httpx
import pytest

from actors.serving.http_api import build_app
from actors.serving.page import DOCS_FILE, PAGE_FILE, PAGE_PATHS
from rlhf_critic.data.preference_schema import parse_row
from rlhf_critic.errors import ScorerUnavailable
from tests.actors.serving.test_http_limits import DIGEST, GOOD, JSON, PAGES, Service, ask

PAGE = PAGE_FILE.read_text(encoding="utf-8")
JUDGED = {"prompt": "Name a prime.", "chosen": "7", "rejected": "9", "judge": "Ada"}
TOKEN = {"Authorization": "Bearer a secret of some length"}
GETS = [("GET", path, {}, b"") for path in sorted(PAGE_PATHS)]
# What could turn a text into HTML or code. The policy forbids it too, in browsers that know it.
UNSAFE = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser|setAttribute\(.on"


def policy_of(answer):
    return dict(part.strip().split(" ", 1) for part in answer.headers["Content-Security-Policy"].split(";"))


def judge(service, body=JUDGED, headers=JSON):
    (answer,) = ask(service, ("POST", "/judgements", headers, json.dumps(body).encode()))
    return answer


def test_every_page_is_served_from_files_of_the_installation():
    answers = ask(Service(), *GETS)
    assert [answer.status_code for answer in answers] == [200] * 4
    kinds = dict(zip(sorted(PAGE_PATHS), (one.headers["Content-Type"].split(";")[0] for one in answers), strict=True))
    assert kinds == {
        "/": "text/html",
        "/docs": "text/html",
        "/docs/swagger-ui-bundle.js": "text/javascript",
        "/docs/swagger-ui.css": "text/css",
    }
    for answer in answers:
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
    (missing,) = ask(Service(), ("GET", "/docs/page.py", {}, b""))
    assert missing.json()["error"]["kind"] == "not_found"


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_the_policy_allows_the_scripts_of_the_page_alone(path):
    (answer,) = ask(Service(), ("GET", path, {}, b""))
    policy = policy_of(answer)
    own = "" if path == "/" else "'self' "
    for element in ("script", "style"):
        (text,) = re.findall(rf"<{element}>(.*?)</{element}>", answer.text, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[f"{element}-src"] == f"{own}'sha256-{digest}'"
    assert {name: policy[name] for name in ("default-src", "connect-src", "form-action", "frame-ancestors")} == {
        "default-src": "'none'",
        "connect-src": "'self'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }


@pytest.mark.parametrize("file", [PAGE_FILE, DOCS_FILE], ids=lambda file: file.name)
def test_the_source_of_a_page_names_no_other_server_and_writes_no_html(file):
    source = file.read_text(encoding="utf-8")
    assert "//" not in re.sub(r"(?m)^\s*// .*$| // .*$", "", source), "an address"
    assert not re.search(UNSAFE, source)
    assert not re.search(r"<[^>]+\s(?:on\w+|style)=", source.partition("<script>")[0]), "the policy blocks these"
    assert len(source.splitlines()) < 700


def test_texts_in_the_page_have_labels_and_tabs_have_panels():
    for name in re.findall(r'<(?:input|textarea)[^>]* id="([^"]+)"', PAGE):
        assert f'for="{name}"' in PAGE
    for name, panel in re.findall(r'role="tab" id="([^"]+)" aria-controls="([^"]+)"', PAGE):
        assert f'id="{panel}" aria-labelledby="{name}"' in PAGE
    assert '<html lang="en">' in PAGE


def test_the_page_is_open_and_its_data_is_behind_the_token(tmp_path):
    service = Service(token_sha256=DIGEST, host="0.0.0.0", collect=str(tmp_path / "judged.jsonl"))
    assert [answer.status_code for answer in ask(service, *GETS)] == [200] * 4
    for path in ("/info", "/openapi.json", "/docs/other"):
        assert ask(service, ("GET", path, {}, b""))[0].status_code == 401
    assert judge(service).status_code == 401
    assert not (tmp_path / "judged.jsonl").exists()
    assert judge(service, headers={**JSON, **TOKEN}).status_code == 200


@pytest.mark.parametrize("page", PAGES)
def test_a_web_page_can_neither_read_the_page_nor_judge(page, tmp_path):
    service = Service(collect=str(tmp_path / "judged.jsonl"))
    assert {answer.status_code for answer in ask(service, *[(m, p, PAGES[page], b) for m, p, _, b in GETS])} == {403}
    assert judge(service, headers={**JSON, **PAGES[page]}).status_code == 403
    assert not (tmp_path / "judged.jsonl").exists()


def test_a_link_on_another_site_leads_to_the_page_and_to_nothing_else():
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    frame, rebound = {**link, "Sec-Fetch-Dest": "iframe"}, {**link, "Host": "attacker.example"}
    page, info, score, framed, other = ask(
        Service(),
        ("GET", "/", link, b""),
        ("GET", "/info", link, b""),
        ("POST", "/score", {**JSON, **link}, GOOD),
        ("GET", "/", frame, b""),
        ("GET", "/", rebound, b""),
    )
    assert [one.status_code for one in (page, info, score, framed, other)] == [200, 403, 403, 403, 403]


def test_a_pool_below_a_path_has_its_page_there_too():
    async def main():
        transport = httpx.ASGITransport(build_app(Service().itself), root_path="/judge")
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
            page, moved = await client.get("/judge/"), await client.get("/judge")
            assert page.status_code == 200
            assert moved.headers["Location"].endswith("/judge/"), "relative addresses need the slash"
            spec = (await client.get("/judge/openapi.json")).json()
            assert spec["servers"] == [{"url": "/judge"}]

    asyncio.run(main())


def test_a_judgement_becomes_a_row_of_training_data(tmp_path):
    file = tmp_path / "judged.jsonl"
    answer = judge(Service(collect=str(file)))
    assert answer.json() == {"model_version": "v1", "chosen_reward": 0.0, "rejected_reward": 0.0}
    row = json.loads(file.read_text())
    assert parse_row("row", row, {}).conversations() == [("Name a prime.", "7"), ("Name a prime.", "9")]
    assert (row["judge"], row["model_version"]) == ("Ada", "v1")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", row["judged_at"])


REFUSED = {
    "equal answers": ({"rejected": "7"}, 422, "not_a_preference"),
    "an empty answer": ({"chosen": ""}, 422, "invalid_request"),
    "a path": ({"file": "/etc/passwd"}, 422, "invalid_request"),
    "a long name": ({"judge": "a" * 201}, 422, "invalid_request"),
    "half a surrogate pair": ({"chosen": "\ud800"}, 422, "invalid_request"),
    "a body that is too large": ({"chosen": "a" * 100_000}, 413, "body_too_large"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_judgement_is_not_saved(what, tmp_path):
    change, status, kind = REFUSED[what]
    file = tmp_path / "judged.jsonl"
    answer = judge(Service(collect=str(file), max_body_bytes=100_000), {**JUDGED, **change})
    assert (answer.status_code, answer.json()["error"]["kind"]) == (status, kind)
    assert not file.exists()


def test_a_judgement_without_a_score_or_a_file_is_an_error(tmp_path):
    assert judge(Service()).json()["error"]["kind"] == "not_collecting"
    unwritable = judge(Service(collect=str(tmp_path / "missing" / "judged.jsonl")))
    assert unwritable.status_code == 503
    assert str(tmp_path) not in unwritable.text, "callers need not know the operator's paths"

    class Gone(Service):
        async def score(self, items, values, version):
            raise ScorerUnavailable("no replica")

    assert judge(Gone(collect=str(tmp_path / "judged.jsonl"))).status_code == 503
    assert not list(tmp_path.iterdir())


def test_texts_of_tokens_are_answered_where_asked():
    asked = []

    class Texts(Service):
        async def score(self, items, values, version):
            asked.extend(items)
            return await super().score(items, values, version)

    for more in (b"", b', "token_texts": true'):
        ask(Texts(), ("POST", "/score", JSON, GOOD[:-1] + more + b"}"))
    assert [getattr(item, "token_texts", False) for item in asked] == [False, True]


def test_an_answer_without_them_has_no_field_that_older_clients_reject():
    (answer,) = ask(Service(), ("POST", "/score", JSON, GOOD))
    assert list(answer.json()) == ["model_version", "rewards", "truncated", "tokens", "components", "values"]
