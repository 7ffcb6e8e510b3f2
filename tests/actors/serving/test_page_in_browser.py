"""The page in a real Chromium, in front of a real pool: every tab, hostile texts, and a publication in between.

The tests are skipped where Playwright or a Chromium of the system (Debian's package `chromium`) is missing.
"""

import json
import re
import shutil

import pytest

from actors.serving import control
from jobs.serve import read_token
from rlhf_critic.checkpoint.critic_directory import load_critic
from rlhf_critic.data.preferences import load_preferences
from tests.actors.scorers import rewards_by_engine

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: install Debian's package chromium"),
]
expect = sync_api.expect
WAIT_MS = 60_000
HOSTILE = [
    "<img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'</script>",
    "</textarea></script><style>*{display:none}</style>{{7*7}}${7*7}",
    "مرحبا بالعالم \u202e abc \u2066 עברית",
    "👩‍👩‍👧 🏳️‍🌈 e\u0301 \u0000\u0007 </s><|im_end|>",
]


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium without a sandbox, because tests may run as root."""
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def page(browser):
    """Yields a new tab. Fails if the page had an error, asked another server, or opened a dialog."""
    context = browser.new_context(accept_downloads=True)
    context.set_default_timeout(WAIT_MS)
    expect.set_options(timeout=WAIT_MS)
    tab = context.new_page()
    faults, requests = [], []
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.on("dialog", lambda dialog: (faults.append(dialog.message), dialog.dismiss()))
    tab.on("console", lambda said: faults.append(said.text) if "Content Security Policy" in said.text else None)
    tab.on("request", lambda request: requests.append(request.url))
    yield tab
    assert not faults
    assert {url.split("/")[2] for url in requests if not url.startswith(("data:", "blob:"))} == {tab.url.split("/")[2]}
    assert "hacked" not in tab.title()
    context.close()


@pytest.fixture
def url(serving, critics, tmp_path):
    return serving(critics["first"], max_replicas=1, collect=str(tmp_path / "judged.jsonl"))


def score(page, prompt, *answers):
    page.fill("#prompt", prompt)
    for number, answer in enumerate(answers, 1):
        page.fill(f"#answer-{number}", answer)
    page.click("#score")
    expect(page.locator("#try-said")).to_contain_text("Scored by")


def numbers(page, table):
    cells = page.locator(f"table[aria-label={table}] td.number").all_inner_texts()
    return [float(text) for text in cells if text]


def test_typing_scoring_and_the_values_at_tokens(page, url, critics):
    page.goto(url)
    answers = ["of course", "go away\nno"]
    score(page, "please explain", *answers)
    wanted = rewards_by_engine(critics["first"], [("please explain", answer) for answer in answers])
    assert numbers(page, "Rewards") == pytest.approx(wanted, abs=1e-4)
    (first, second) = numbers(page, "Probabilities")
    assert first + second == pytest.approx(1, abs=2e-4)
    assert (first > second) == (wanted[0] > wanted[1])
    encoder = load_critic(critics["first"]).encoder
    for answer, heat in zip(answers, page.locator(".heat").all(), strict=True):
        assert heat.text_content().replace("↵", "").replace("\u200b", "") == encoder.render("please explain", answer)
        assert heat.locator("[role=option]").count() == len(encoder.encode("please explain", answer).ids)
    heat = page.locator(".heat").first
    heat.press("End")
    assert heat.locator("[aria-selected=true]").get_attribute("aria-label") == f"</s>: {wanted[0]:.4f}"
    page.fill("#prompt", "please " * 80)
    page.press("#prompt", "Control+Enter")
    expect(page.locator(".heat").first).to_contain_text("truncated: the critic reads the last 64 tokens")


def test_tabs_by_keyboard_and_a_link_to_texts(page, url):
    page.goto(url)
    page.focus("#tab-try")
    for name in ("compare", "judge", "status", "try"):
        page.keyboard.press("ArrowRight")
        expect(page.locator(f"#{name}")).to_be_visible()
        assert page.evaluate("document.activeElement.id") == f"tab-{name}"
        assert page.locator("[role=tabpanel]:visible").count() == 1
    page.fill("#prompt", HOSTILE[0])
    page.fill("#answer-1", HOSTILE[2])
    page.click("#share")
    expect(page.locator("#try-said")).to_contain_text("link")
    link = page.url
    assert "?" not in link.replace("%3F", "")
    page.goto("about:blank")
    page.goto(link)
    assert page.input_value("#prompt") == HOSTILE[0]
    assert page.input_value("#answer-1") == HOSTILE[2]
    assert [page.get_attribute(box, "dir") for box in ("#prompt", "#answer-1")] == ["ltr", "rtl"]
    assert page.locator(".heat").count() == 0, "a link scores nothing before the person wants it"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_hostile_texts_are_texts_at_every_width(page, url, scheme, width):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(url)
    for text in HOSTILE:
        score(page, text, text, text)
        assert page.locator(".heat").count() == 2
        assert page.locator("img").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "no sideways scrolling"


def test_a_text_of_a_megabyte_is_refused_with_the_limit(page, url):
    page.goto(url)
    page.evaluate("text => { document.getElementById('prompt').value = text; }", "please thank you " * 2**16)
    page.click("#score")
    expect(page.locator("#try-said")).to_contain_text("bytes, maximum 524288: shorten it")
    score(page, "please", "of course", "no")


def test_a_file_is_scored_sorted_searched_and_exported(page, url, critics, tmp_path):
    texts = [*HOSTILE, "of course", "a" * 600_000, '=1+1,"quoted"\r\nsecond line']
    rows = [{"prompt": f"p{number}", "response": text, "id": number} for number, text in enumerate(texts)]
    rows += [{"prompt": "two", "chosen": "glad", "rejected": "no"}, {"nothing": 1}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    page.goto(url)
    page.click("#tab-compare")
    page.set_input_files("#compare-file", str(file))
    said = page.locator("#compare-said")
    expect(said).to_contain_text("Scored 8 answers")
    expect(said).to_contain_text("1 could not be scored. 1 rows have no answer")
    page.get_by_role("button", name="Reward").click()
    shown = [float(text) for text in page.locator("#compare-table td.number:nth-child(4)").all_inner_texts()]
    assert len(shown) == 8
    assert shown == sorted(shown, reverse=True)
    page.fill("#search", "SECOND LINE")
    assert page.locator("#compare-table tbody tr").count() == 1
    with page.expect_download() as download:
        page.click("#compare-export")
    assert download.value.suggested_filename == "rows-scored.jsonl"
    lines = [json.loads(line) for line in download.value.path().read_text(encoding="utf-8").splitlines()]
    assert [{name: line[name] for name in row} for line, row in zip(lines, rows, strict=True)] == rows
    wanted = rewards_by_engine(critics["first"], [("p4", "of course"), ("two", "glad"), ("two", "no")])
    assert lines[4]["reward"] == pytest.approx(wanted[0], abs=1e-5)
    assert [one["reward"] for one in lines[7]["scores"]] == pytest.approx(wanted[1:], abs=1e-5)
    assert "600000 bytes" in lines[5]["error"] or "600002 bytes" in lines[5]["error"]


def test_a_comma_separated_file_is_read_as_training_reads_it(page, url, tmp_path):
    file = tmp_path / "rows.csv"
    file.write_bytes('\ufeffprompt,response\r\n"say ""hi"", please","two\r\nlines"\r\nq,r\r\n'.encode())
    page.goto(url)
    page.click("#tab-compare")
    page.set_input_files("#compare-file", str(file))
    expect(page.locator("#compare-said")).to_contain_text("Scored 2 answers by")
    with page.expect_download() as download:
        page.click("#compare-export")
    lines = [json.loads(line) for line in download.value.path().read_text(encoding="utf-8").splitlines()]
    assert [(line["prompt"], line["response"]) for line in lines] == [('say "hi", please', "two\r\nlines"), ("q", "r")]


def test_judging_while_another_critic_is_published(page, url, critics, tmp_path):
    texts = enumerate(HOSTILE)
    pairs = [{"prompt": f"p {number}", "chosen": f"{text} a", "rejected": f"{text} b"} for number, text in texts]
    file, judged = tmp_path / "pairs.jsonl", tmp_path / "judged.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    page.goto(url)
    page.click("#tab-judge")
    page.fill("#judge-name", "Ada 120s")
    page.set_input_files("#judge-file", str(file))
    count = page.locator("#judge-count")
    expect(count).to_contain_text("4 left")
    page.locator("#judge-name").blur()
    picked = [page.locator("#judge-2").text_content()]
    page.keyboard.press("2")
    expect(count).to_contain_text("1 saved")
    control.publish("scorers", critics["second"], 200, lambda _: None)
    picked.append(page.locator("#judge-1").text_content())
    page.get_by_role("button", name="First is better").click()
    expect(count).to_contain_text("2 saved")
    expect(page.locator("#version")).to_contain_text("tiny@2#")
    page.keyboard.press("0")
    expect(count).to_contain_text("1 equal")
    page.keyboard.press("s")
    expect(page.locator("#judge-said")).to_contain_text("All pairs are judged")
    rows = [json.loads(line) for line in judged.read_text(encoding="utf-8").splitlines()]
    assert [row["chosen"] for row in rows] == picked
    assert [(row["prompt"], {row["chosen"], row["rejected"]}) for row in rows] == [
        (pair["prompt"], {pair["chosen"], pair["rejected"]}) for pair in pairs[:2]
    ]
    assert [row["model_version"][:6] for row in rows] == ["tiny@1", "tiny@2"]
    assert {row["judge"] for row in rows} == {"Ada 120s"}
    agreed = sum(row["chosen_reward"] > row["rejected_reward"] for row in rows)
    assert f"agreed with {agreed} " in count.text_content()
    encoder = load_critic(critics["first"]).encoder
    assert len(load_preferences(str(judged), encoder, str(tmp_path / "cache"))) == 2
    page.click("#tab-status")
    status = page.locator("#status-found")
    expect(status).to_contain_text("tiny@1#")  # among the last publications
    assert re.search(r"p50.*\d+ ms", status.text_content())


def test_the_token_is_asked_for_and_stays_in_the_tab(page, serving, critics, tmp_path):
    file = str(tmp_path / "token")
    url = serving(critics["first"], max_replicas=1, auth="on", token_file=file)
    token = read_token(file)
    page.goto(url)
    for attempt in ("wrong", token):
        page.fill("#token", attempt)
        page.get_by_role("button", name="Continue").click()
        if attempt == "wrong":
            expect(page.locator("#ask-said")).to_contain_text("refused")
    expect(page.locator("#version")).to_contain_text("tiny@1#")
    score(page, "please", "of course", "no")
    assert token not in page.url
    assert page.evaluate("[localStorage.length, document.cookie, sessionStorage.getItem('token')]") == [0, "", token]
    page.get_by_role("link", name="HTTP endpoints").click()
    expect(page.locator("#endpoints")).to_contain_text("/score")
    another = page.context.new_page()
    another.goto(url)
    expect(another.locator("#ask")).to_be_visible()
