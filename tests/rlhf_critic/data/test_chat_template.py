"""A response stands whole in the text that a critic reads, whatever the template does to it, and a policy starts where
its template says."""

import json

import pytest

from rlhf_critic.data.encoding import Encoder, load_tokenizer
from rlhf_critic.data.preferences import load_preferences
from rlhf_critic.errors import EncodingError

USER = "{% if m.role != 'assistant' %}<|{{ m.role }}|>{{ m.content }}"
LOOP, END_LOOP = "{% for m in messages %}", "{% endif %}{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|assistant|>THINK{% endif %}"
OPENED = "<think>{{ '\\n' }}"
TEMPLATES = {
    "drops the reasoning": (
        f"{LOOP}{USER}{{% else %}}<|assistant|>{{{{ m.content.split('</think>')[-1] }}}}</s>{END_LOOP}"
    ),
    "frames the reasoning": (
        f"{LOOP}{USER}{{% else %}}<|assistant|><think>{{{{ m.content.split('</think>')[0].split('<think>')[-1].strip() "
        "if '</think>' in m.content else '' }}</think>{{ m.content.split('</think>')[-1].strip() }}</s>" + END_LOOP
    ),
    "strips": f"{LOOP}{USER}{{% else %}}<|assistant|>{{{{ m.content | trim }}}}</s>{END_LOOP}",
    "takes parts": "{% for m in messages %}<|{{ m.role }}|>{% for part in m.content %}{{ part.text }}{% endfor %}{% if "
    "m.role == 'assistant' %}</s>{% endif %}{% endfor %}",
}
THOUGHT = "<think>\nTwo.\n</think>\n\n4"


def encoder_of(tokenizer_dir, template) -> Encoder:
    return Encoder(load_tokenizer(tokenizer_dir(chat_template=template)), 256)


@pytest.mark.parametrize(
    ("template", "response", "expected", "change"),
    [
        ("drops the reasoning", THOUGHT, THOUGHT, "kept whole"),
        ("drops the reasoning", "Two.</think>4", "Two.</think>4", "kept whole"),
        ("drops the reasoning", "4", "4", ""),
        ("drops the reasoning", " 4\n", " 4\n", ""),
        ("frames the reasoning", THOUGHT, "<think>Two.</think>4", "white space"),
        (
            "frames the reasoning",
            "<think>a</think>b<think>c</think>d",
            "<think>a</think>b<think>c</think>d",
            "kept whole",
        ),
        ("frames the reasoning", "4", "<think></think>4", ""),
        ("strips", "    print(1)", "print(1)", "white space"),
        ("strips", "print(1)", "print(1)", ""),
        ("strips", "   ", "", "white space"),
        ("takes parts", " 4\n", " 4\n", ""),
    ],
)
def test_a_response_is_whole_in_the_text(template, response, expected, change, tokenizer_dir):
    encoder = encoder_of(tokenizer_dir, TEMPLATES[template])
    rendered = encoder.render_conversation("What is 2+2?", response)
    if template == "frames the reasoning" and change == "kept whole":
        expected = f"<think></think>{expected}"
    assert rendered.text == f"<|user|>What is 2+2?<|assistant|>{expected}</s>"
    assert rendered.change == change


def test_responses_that_differ_in_what_a_template_drops_are_not_identical(tokenizer_dir, tmp_path):
    rows = [
        {"prompt": "2+2?", "chosen": THOUGHT, "rejected": "<think>\nI guess.\n</think>\n\n4"},
        {"prompt": "2+2?", "chosen": THOUGHT, "rejected": THOUGHT},
        {"prompt": "code", "chosen": "    print(1)", "rejected": "print(1)"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts = {}
    for name in ("drops the reasoning", "strips"):
        encoder = encoder_of(tokenizer_dir, TEMPLATES[name])
        (report,) = load_preferences(str(path), encoder, str(tmp_path / "cache")).reports.values()
        counts[name] = (report.identical, report.kept_whole, report.white_space)
    assert counts == {"drops the reasoning": (1, 2, 0), "strips": (2, 0, 1)}
    assert "1 with a response whose white space the chat template changes" in str(report)


@pytest.mark.parametrize("thinks", [False, True])
def test_a_policy_starts_from_the_generation_prompt(thinks, tokenizer_dir):
    prompt = PROMPT.replace("THINK", OPENED if thinks else "")
    encoder = encoder_of(tokenizer_dir, TEMPLATES["drops the reasoning"] + prompt)
    opening = "<|user|>2+2?<|assistant|>" + ("<think>\n" if thinks else "")
    assert encoder.open("2+2?") == opening
    assert encoder.encode_opening("2+2?") == encoder.tokenizer(opening, add_special_tokens=False)["input_ids"]
    # What the policy goes on to write gives the text that it saw, and so does a data row with all of the reasoning.
    for response in ("Two.\n</think>\n\n4" if thinks else THOUGHT, THOUGHT):
        assert encoder.render("2+2?", response) == f"<|user|>2+2?<|assistant|>{THOUGHT}</s>"
    assert encoder.render("2+2?", "4") == "<|user|>2+2?<|assistant|>4</s>"


def test_a_template_without_a_generation_prompt_gives_what_comes_before_a_response(tokenizer_dir):
    encoder = encoder_of(tokenizer_dir, TEMPLATES["frames the reasoning"])
    assert encoder.open("a") == "<|user|>a<|assistant|><think></think>"
    assert Encoder(load_tokenizer(encoder.tokenizer.name_or_path, "plain"), 256).open("a") == "a"


def test_a_template_that_leaves_out_the_answer_is_refused(tokenizer_dir):
    encoder = encoder_of(tokenizer_dir, "{{ messages[0].content }}{{ eos_token }}")
    with pytest.raises(EncodingError, match=r"leaves out the assistant's last turn.*encoding\.chat_template"):
        encoder.encode("a", "b")
    with pytest.raises(EncodingError, match="leaves out the assistant's last turn"):
        encoder.open("a")
