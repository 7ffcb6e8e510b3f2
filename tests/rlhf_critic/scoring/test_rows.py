"""A row that cannot be scored is refused at the first reading, by its place and field."""

import pytest

from rlhf_critic.errors import DataError
from rlhf_critic.scoring.items import Conversation
from rlhf_critic.scoring.rows import parse_scorable

EMPTY = {
    "texts": ({"prompt": "", "response": ""}, "response"),
    "no turns": ({"prompt": [], "response": ""}, "response"),
    "empty turns": ({"prompt": [{"role": "user", "content": ""}], "response": ""}, "response"),
    "one of several": ({"prompt": "", "responses": ["a", ""]}, "responses.1"),
    "a chat": ({"messages": [{"role": "assistant", "content": ""}]}, "messages"),
}


@pytest.mark.parametrize("what", EMPTY)
def test_an_empty_prompt_with_an_empty_response_is_refused(what):
    row, field = EMPTY[what]
    with pytest.raises(DataError, match=rf"rows.jsonl:7: field '{field}': the prompt and the response are empty"):
        parse_scorable("rows.jsonl:7", row, {})


def test_the_field_has_the_name_of_the_data():
    with pytest.raises(DataError, match=r"rows.jsonl:7: field 'answer'"):
        parse_scorable("rows.jsonl:7", {"question": "", "answer": ""}, {"prompt": "question", "response": "answer"})


@pytest.mark.parametrize("row", [{"prompt": "a", "response": ""}, {"prompt": "", "response": "a"}])
def test_one_of_both_may_be_empty(row):
    (item,) = parse_scorable("rows.jsonl:7", row, {})
    assert isinstance(item, Conversation)
    assert item.response == row["response"]
