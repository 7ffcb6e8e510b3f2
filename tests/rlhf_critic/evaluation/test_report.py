"""The report page is one file without links that shows data as text; a report is written atomically."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from rlhf_critic.errors import ConfigError
from rlhf_critic.evaluation.bootstrap import BootstrapEstimate
from rlhf_critic.evaluation.plots import histogram_svg, length_svg, reliability_svg
from rlhf_critic.evaluation.preferences import evaluate_rewards
from rlhf_critic.evaluation.report import (
    MAX_CHARACTERS,
    Bar,
    Page,
    Plot,
    highlighted_example,
    preference_figures,
    render,
    validate_report_directory,
    write_report,
)

NASTY = "<script>alert('x')</script>&amp;\"' </pre><img src=http://example.com/x.png> \ud800 é中 $\\frac$"


def page_of(text: str = "plain") -> Page:
    """Returns a page in which every text from data is ``text``."""
    rng = np.random.default_rng(0)
    rewards = rng.normal([0.5, 0], size=(60, 2))
    lengths = rng.integers(1, 99, (60, 2))
    evaluation = evaluate_rewards(rewards[:, 0], rewards[:, 1], lengths)
    plots = [
        reliability_svg(evaluation.calibration.raw, evaluation.calibration.scaled),
        histogram_svg(rewards[:, 0] - rewards[:, 1], "margin"),
        length_svg(rewards, lengths),
    ]
    return Page(
        title=text,
        source=text,
        figures=preference_figures(evaluation),
        baseline_name="longer text wins",
        bars=[Bar(text, 3, BootstrapEstimate(0.5, 0.2, 0.8), 0.4)],
        plots=[Plot("title", "caption", svg) for svg in plots],
        examples=[
            highlighted_example(
                f"{text}:7", "margin -1", {"chosen": f"a {text} b", "rejected": f"a {text} c"}, ["</s>"]
            )
        ],
    )


class Parsed(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_text_from_data_stays_text():
    plain, nasty = Parsed(render(page_of())), Parsed(render(page_of(NASTY)))
    assert [tag for tag, _ in nasty.tags] == [tag for tag, _ in plain.tags]
    shown = NASTY.replace("\ud800", "?")
    assert nasty.text.count(shown) >= 5  # the critic, the source, the subset, the origin, the texts
    assert "script" not in {tag for tag, _ in nasty.tags}


def test_the_page_asks_nothing_of_anyone():
    parsed = Parsed(render(page_of(NASTY)))
    for tag, attributes in parsed.tags:
        assert tag not in {"script", "link", "img", "iframe", "object"}
        for name, value in attributes.items():
            if name in {"src", "href", "xlink:href", "data", "action"}:
                assert value.startswith("#"), (tag, name, value)
            assert not name.startswith("on")
            assert "url(" not in (value or "").replace("url(#", "")
    policy = next(attributes["content"] for tag, attributes in parsed.tags if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'")


def test_plots_take_every_colour_from_the_page():
    html = render(page_of())
    defined = set(re.findall(r"(--\w+):", html))
    drawings = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(drawings) == 3
    for drawing in drawings:
        assert "fill: var(--first)" in drawing
        assert set(re.findall(r"var\((--\w+)\)", drawing)) <= defined
        assert re.findall(r"(?:fill|stroke): (?:#|rgb|black|white)", drawing) == []


def test_every_figure_is_on_the_page():
    page = page_of()
    text = " ".join(Parsed(render(page)).text.split())
    for figure in page.figures:
        for part in (figure.name, figure.value, figure.meaning):
            assert part in text
    assert "0.500 [0.200, 0.800]" in text


def test_what_texts_share_is_told_once_and_special_tokens_apart():
    texts = {"chosen": "<s>tell me</s>it was good</s>", "rejected": "<s>tell me</s>it was gone [/s]</s>"}
    example = highlighted_example("f:1", "", texts, ["<s>", "</s>"])
    assert example.shared.pieces == (("<s>", True), ("tell me", False), ("</s>", True), ("it was ", False))
    assert example.texts[0].pieces == (("good", False), ("</s>", True))
    assert example.texts[1].pieces == (("gone [/s]", False), ("</s>", True))


def test_a_long_text_loses_its_middle_and_says_so():
    text = highlighted_example("f:1", "", {"chosen": "x" * 9000 + "end", "rejected": "y"}, []).texts[0]
    (piece,) = text.pieces
    assert f"[... {9003 - MAX_CHARACTERS} characters omitted ...]" in piece[0]
    assert piece[0].endswith("xend")


@pytest.mark.parametrize("values", [[0.0], [-2.0, -2.0], [1e-12, 3.0], [-5.0, 0.0, 7.5]])
def test_a_bar_of_the_histogram_is_right_or_wrong_and_not_both(values):
    assert "<svg" in histogram_svg(np.array(values), "margin")


def test_a_report_is_whole_and_never_overwrites(tmp_path):
    directory = tmp_path / "new" / "report"
    write_report(str(directory), {"accuracy": 0.5}, page_of())
    assert {path.name for path in directory.iterdir()} == {"metrics.json", "report.html"}
    assert json.loads((directory / "metrics.json").read_text()) == {"accuracy": 0.5}
    assert (directory / "report.html").read_text(encoding="utf-8").rstrip().endswith("</html>")
    with pytest.raises(ConfigError, match="not an empty directory; give a new one, or empty it"):
        validate_report_directory(str(directory))
    with pytest.raises(ConfigError, match="not an empty directory"):
        validate_report_directory(str(directory / "report.html"))
    with pytest.raises(ConfigError, match=r"cannot be written \(.*; free space or give another directory"):
        validate_report_directory(str(directory / "report.html" / "inside"))
