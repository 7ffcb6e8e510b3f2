"""Turns as agents write them: parts, tools, calls and further fields are rendered as transformers renders them."""

import json

import pytest

from rlhf_critic.data.conversation import ToolPrompt, Turn, to_prompt, turns_of
from rlhf_critic.data.encoding import Encoder, load_tokenizer
from rlhf_critic.data.preference_schema import parse_row
from rlhf_critic.data.preferences import load_preferences
from rlhf_critic.data.prompts import load_prompts
from rlhf_critic.errors import EncodingError
from rlhf_critic.scoring.http_schema import ScoreRequest
from rlhf_critic.scoring.rows import parse_scorable
from tests.helpers import save_tiny_tokenizer
from tests.rlhf_critic.data.agent_rows import ANSWER, CALL, CALLING, RESULT, ROWS, TEMPLATE, TOOLS, USER, WRONG

PARTS_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{{ eos_token }}{% endfor %}"
)
PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.fixture(scope="module")
def encoder_of(tmp_path_factory):
    def make(template, **options):
        folder = tmp_path_factory.mktemp("tokenizer")
        return Encoder(load_tokenizer(save_tiny_tokenizer(folder, chat_template=template)), 1024, **options)

    return make


@pytest.fixture(scope="module")
def encoder(encoder_of):
    return encoder_of(TEMPLATE)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rendered_by_transformers(encoder, turns, tools=None):
    return encoder.tokenizer.apply_chat_template(turns, tools=tools, tokenize=False)


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("name", ROWS)
def test_both_sides_are_rendered_as_transformers_renders_them(encoder, name, tools):
    row = ROWS[name]
    preference = parse_row("file:1", {**row, "tools": tools}, {})
    for side, (prompt, response) in zip(("chosen", "rejected"), preference.conversations(), strict=True):
        expected = rendered_by_transformers(encoder, [*row.get("prompt", []), *row[side]], tools)
        rendered = encoder.render_conversation(prompt, response)
        assert (rendered.text, rendered.change) == (expected, "")
        assert ("<tools>" in expected) == bool(tools)


def test_tools_may_be_json_and_fields_of_a_table_that_are_none_are_absent():
    as_table = {"role": "assistant", "content": None, "name": None, "tool_calls": [{**CALL, "id": None}]}
    assert Turn.model_validate(as_table).to_message() == CALLING
    row = {"prompt": [USER], "chosen": [ANSWER], "rejected": [WRONG], "tools": json.dumps(TOOLS)}
    assert parse_row("file:1", row, {}).tools == tuple(TOOLS)


def test_a_single_part_is_its_text_and_several_are_joined_as_the_template_joins_them(encoder_of):
    parts = [{"type": "text", "text": "Add 1"}, {"type": "text", "text": "and 2."}]
    assert Turn(role="user", content=parts[:1]).to_message() == {"role": "user", "content": "Add 1"}
    prompt = to_prompt([Turn(role="user", content=parts)])
    joins, reads_texts = encoder_of(PARTS_TEMPLATE), encoder_of(PLAIN)
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "3"}]
    assert joins.render(prompt, "3") == rendered_by_transformers(joins, turns)
    assert "Add 1and 2." in joins.render(prompt, "3")
    assert "Add 1\nand 2." in reads_texts.render(prompt, "3")  # transformers would write a Python list here


def test_a_template_that_leaves_out_the_judged_call_is_refused(encoder_of):
    plain = encoder_of("{% for m in messages %}[{{ m.role }}]{{ m.content or '' }}{{ eos_token }}{% endfor %}")
    with pytest.raises(EncodingError, match="leaves out the tool calls of the last turn"):
        plain.encode([USER], CALLING)
    assert plain.encode([USER, CALLING, RESULT], "3").ids  # as TRL, whatever the template does with earlier turns


def test_a_special_token_in_a_call_is_text(encoder_of):
    encoder = encoder_of(TEMPLATE, special_tokens_in_text="text")
    eos = encoder.tokenizer.eos_token
    call = {**CALL, "function": {"name": "add", "arguments": {"a": f"1{eos}"}}}
    prompt = ToolPrompt((USER,), ({**TOOLS[0], "note": eos},))
    encoded = encoder.encode(prompt, {**CALLING, "tool_calls": [call]})
    assert encoded.rendered.has_special_tokens
    assert encoded.ids.count(encoder.tokenizer.eos_token_id) == 2  # those of the template


def test_sharegpt_turns_are_openai_turns():
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Add 1 and 2."},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "It is 3."},
    ]
    read = [Turn.model_validate(turn).to_message() for turn in turns]
    assert read == [{"role": "system", "content": "Be brief."}, USER, CALLING, {"role": "tool", "content": "3"}, ANSWER]
    row = {"conversations": turns[:4], "chosen": turns[4], "rejected": {"from": "gpt", "value": "It is 4."}}
    assert parse_row("file:1", row, {}).conversations() == [(read[:4], "It is 3."), (read[:4], "It is 4.")]


def test_every_way_to_ask_gives_the_same_text(encoder, tmp_path):
    """Training data, PPO prompts, rows to score and HTTP requests share one rendering."""
    prompt, tools = [USER, CALLING, RESULT], TOOLS
    expected = rendered_by_transformers(encoder, [*prompt, ANSWER], tools)
    rows = [
        {"prompt": prompt, "response": ANSWER["content"], "tools": tools},
        {"messages": [*prompt, ANSWER], "tools": json.dumps(tools)},
    ]
    items = [item for row in rows for item in parse_scorable("file:1", row, {})]
    sent = ScoreRequest.model_validate(json.loads(json.dumps(ScoreRequest.of(items, False, None))))
    for item in (*items, *(model.to_item() for model in sent.items)):
        assert encoder.render(item.prompt, item.response) == expected
    (source,) = [write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": prompt, "tools": tools}])]
    prompts = load_prompts([source], encoder, 512)
    assert encoder.tokenizer.decode(prompts.ids[0]) == encoder.open(prompts.prompts[0])
    assert encoder.open(prompts.prompts[0]) + ANSWER["content"] + encoder.tokenizer.eos_token == expected
    assert turns_of(prompts.prompts[0]) == prompt


def test_tools_decide_whether_prompts_are_equal(encoder, tmp_path):
    row = {"prompt": [USER], "chosen": [ANSWER], "rejected": [WRONG]}
    rows = [row, {**row, "tools": TOOLS}, {**row, "chosen": [{**ANSWER, "content": "3."}]}]
    table = load_preferences(write_jsonl(tmp_path / "p.jsonl", rows), encoder, str(tmp_path / "cache"))
    assert table.prompts_N.tolist() == [0, 1, 0]
