"""Ratings, outcomes and step labels become targets at tokens, whatever layout they come in."""

import json

import numpy as np
import pytest

from rlhf_critic.data.encoding import Encoder, load_tokenizer
from rlhf_critic.data.layouts import parse
from rlhf_critic.data.pointwise_schema import parse_pointwise
from rlhf_critic.data.preferences import load_preferences
from rlhf_critic.data.steps import find_step_ends
from rlhf_critic.errors import DataError, EncodingError
from tests.helpers import save_tiny_tokenizer

USER = {"role": "user", "content": "Add 1 and 2."}
ANSWER = {"role": "assistant", "content": "It is 3."}
STEPS = [{"text": "1 + 2 = 3", "label": True}, {"text": "3 + 1 = 5", "label": False}]


def made(row, **fields):
    return parse("file:7", row, fields)


WAYS = {
    "a text": ({"prompt": "p", "response": "a", "score": 3}, [("score", ("p", "a"), (3.0,))]),
    "messages": ({"messages": [USER, ANSWER], "label": True}, [("label", ([USER], "It is 3."), (1.0,))]),
    "a list": (
        {"prompt": [USER], "responses": ["a", [ANSWER]], "scores": [1, 2.5]},
        [("score", ([USER], "a"), (1.0,)), ("score", ([USER], "It is 3."), (2.5,))],
    ),
    "steps": ({"prompt": "p", "steps": STEPS}, [("steps", ("p", "1 + 2 = 3\n3 + 1 = 5"), (1.0, 0.0))]),
    "HelpSteer": (
        {
            "prompt": "p",
            "response": "a",
            **dict.fromkeys(("helpfulness", "correctness", "coherence", "complexity"), 4),
            "verbosity": 1,
        },
        [("score", ("p", "a"), (4.0,))],
    ),
    "UltraFeedback": (
        {
            "source": "evol",
            "instruction": "p",
            "completions": [
                {"response": "a", "overall_score": 10.0, "fine-grained_score": 1.5},
                {"response": "b", "fine-grained_score": 4.0},
            ],
        },
        [("score", ("p", "a"), (1.5,)), ("score", ("p", "b"), (4.0,))],
    ),
    "PRM800K": (
        {
            "question": {"problem": "p"},
            "label": {
                "steps": [
                    {"completions": [{"text": "x", "rating": -1}, {"text": "a", "rating": 0}], "chosen_completion": 1},
                    {"completions": None, "human_completion": {"text": "b", "rating": None}, "chosen_completion": None},
                    {"completions": [{"text": "c", "rating": -1}], "chosen_completion": None},
                ]
            },
        },
        [("steps", ("p", "a\nb\nc"), (1.0, None, 0.0))],
    ),
    "Math-Shepherd": (
        {"input": "p Step 1: a ки\nStep 2: b ки", "label": "p Step 1: a +\nStep 2: b -", "task": "GSM8K"},
        [("steps", ("p", "Step 1: a\nStep 2: b"), (1.0, 0.0))],
    ),
    "ProcessBench": (
        {"problem": "p", "steps": ["a", "b", "c"], "label": 1, "final_answer_correct": False},
        [("steps", ("p", "a\nb\nc"), (1.0, 0.0, None))],
    ),
    "TRL, stepwise": (
        {"prompt": "p", "completions": ["a", "b"], "labels": [True, False]},
        [("steps", ("p", "a\nb"), (1.0, 0.0))],
    ),
    "TRL, unpaired": ({"prompt": "p", "completion": "a", "label": False}, [("label", ("p", "a"), (0.0,))]),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_layout_gives_targets(way):
    row, expected = WAYS[way]
    found = [
        (one.kind, one.conversation(), tuple(None if np.isnan(target) else target for target in one.targets))
        for one in made(row)
    ]
    assert found == expected


def test_another_attribute_of_helpsteer_is_read_by_its_name():
    (row,) = made(WAYS["HelpSteer"][0], score="verbosity")
    assert row.targets == (1.0,)


BAD = [
    ({"prompt": "p", "response": "a", "score": "x"}, "'score'"),
    ({"prompt": "p", "response": "a", "label": -1}, "'label'"),
    ({"prompt": "p", "response": "a", "label": True, "score": 1}, "exactly one of"),
    ({"prompt": "p", "label": True}, "'response': a row with label needs response or messages; it has none"),
    ({"prompt": "p", "response": "a", "steps": STEPS}, "'response': a row with steps needs steps"),
    ({"prompt": "p", "steps": [{"text": "a"}]}, "'steps': no step has a label"),
    ({"prompt": "p", "steps": [{"text": "", "label": True}]}, "'steps.0.text'"),
    ({"prompt": "p", "responses": ["a"], "scores": [1, 2]}, "'scores': 2 for 1 responses"),
    ({"messages": [USER], "label": True}, "'messages': must end with a turn of the assistant"),
    ({"input": "p", "label": "p", "task": "GSM8K"}, "looks like a row of math shepherd"),
]


@pytest.mark.parametrize(("row", "message"), BAD, ids=[message for _, message in BAD])
def test_a_bad_row_is_refused(row, message):
    with pytest.raises(DataError, match=f"file:7: .*{message}"):
        made(row)


TEMPLATES = {
    "plain ending": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}",
    "no ending": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}",
    "strips": "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }} </s>{% endfor %}",
}
TEXTS = [["of course", "no, thank you", "glad"], ["a</s>b ", "\u00e9\u4e2d", " c\n"], ["a"]]


@pytest.mark.parametrize("special", ["token", "text"])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("steps", TEXTS, ids=["words", "special and long characters", "one"])
def test_a_step_ends_at_the_token_with_its_last_character(tmp_path, template, steps, special):
    tokenizer = load_tokenizer(save_tiny_tokenizer(tmp_path, chat_template=TEMPLATES[template]))
    encoder = Encoder(tokenizer, 512, special)
    encoded = encoder.encode_steps("please", steps)
    ends = encoded.step_tokens
    assert encoded.ids == encoder.encode("please", "\n".join(steps)).ids
    assert len(ends) == len(steps)
    before = ""
    for step, end in zip(steps, ends, strict=True):
        text, without = (tokenizer.decode(encoded.ids[:upto], skip_special_tokens=False) for upto in (end + 1, end))
        assert text.rstrip().endswith(step.strip())
        assert not without.endswith(step.strip()), "an earlier token has the last character already"
        assert text.startswith(before)
        before = text


def test_steps_that_are_cut_off_have_no_target(tmp_path):
    tokenizer = load_tokenizer(save_tiny_tokenizer(tmp_path))
    steps = ["of course", "thank you", "glad"]
    whole = Encoder(tokenizer, 512).encode_steps("please", steps)
    all_ends = whole.step_tokens
    cut = Encoder(tokenizer, len(whole.ids) - all_ends[0] - 1).encode_steps("please", steps)
    assert cut.truncated
    assert cut.ids == whole.ids[all_ends[0] + 1 :]
    assert cut.step_tokens == tuple(end - all_ends[0] - 1 for end in all_ends[1:])


def test_steps_that_a_template_changes_are_refused():
    with pytest.raises(EncodingError, match="changes the step 'b'"):
        find_step_ends("a c</s>", ["a", "b"], ["</s>"])
    assert find_step_ends("e xx e </s>", ["e", "e"], ["</s>"]) == [1, 6]


def test_a_table_holds_targets_beside_preferences(tmp_path):
    encoder = Encoder(load_tokenizer(save_tiny_tokenizer(tmp_path / "tokenizer")), 64)
    rows = [
        {"prompt": "please", "chosen": "of course", "rejected": "no"},
        {"prompt": "please", "responses": ["glad", "no"], "scores": [2, 1]},
        {"prompt": "explain", "steps": [*STEPS, {"text": "so 5"}]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = load_preferences(str(path), encoder, str(tmp_path / "cache"))
    assert table.kinds_N.tolist() == [0, 1, 1, 3]
    assert table.prompts_N.tolist() == [0, 0, 0, 1]
    assert [table.origin(row) for row in range(4)] == [f"{path}:{line}" for line in (1, 2, 2, 3)]
    taken = table.take([3, 0, 2])
    assert [row.kind for row in taken] == ["steps", "preference", "score"]
    assert taken[0].targets_A.tolist() == [1.0, 0.0]
    assert (
        taken[0].tokens_A.tolist()
        == [*encoder.encode_steps("explain", [step["text"] for step in rows[2]["steps"]]).step_tokens][:2]
    )
    assert (taken[2].targets_A.tolist(), taken[2].tokens_A.tolist()) == ([1.0], [len(taken[2].responses[0]) - 1])
    assert len(table.comparisons().rows_P) == 1
    assert table[0].responses[0].tolist() == encoder.encode("please", "of course").ids
    assert [len(part) for part in (table.pairs_alone(), table.select(np.arange(1, 4)).pairs_alone())] == [1, 0]
    (report,) = table.reports.values()
    assert (report.preferences, report.pointwise) == (4, 3)
    assert "1 preferences and 3 rows with targets" in str(report)


def test_fields_of_pointwise_rows_can_be_named():
    (row,) = parse_pointwise(
        "file:1", {"prompt": "p", "output": "a", "stars": 4}, {"response": "output", "score": "stars"}
    )
    assert (row.targets, row.field) == ((4.0,), "output")
