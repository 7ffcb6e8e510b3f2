"""Every supported shape of a row gives the same preference."""

import pytest

from rlhf_critic.data.preference_schema import parse_row
from rlhf_critic.errors import DataError

USER = {"role": "user", "content": "Name a prime."}
CHOSEN = {"role": "assistant", "content": "7 is prime."}
REJECTED = {"role": "assistant", "content": "9 is prime."}
SYSTEM = {"role": "system", "content": "Be brief."}


def parsed(row, **fields):
    return parse_row("file:7", row, fields)


STANDARD = [("Name a prime.", "7 is prime."), ("Name a prime.", "9 is prime.")]
TURNS = [([USER], "7 is prime."), ([USER], "9 is prime.")]

SHAPES = {
    "standard, explicit prompt": (
        {"prompt": "Name a prime.", "chosen": "7 is prime.", "rejected": "9 is prime."},
        STANDARD,
    ),
    "standard, implicit prompt": (
        {"chosen": "Name a prime. 7 is prime.", "rejected": "Name a prime. 71 is prime."},
        [("Name a prime. ", "7 is prime."), ("Name a prime. ", "71 is prime.")],
    ),
    "conversational, explicit prompt": ({"prompt": [USER], "chosen": [CHOSEN], "rejected": [REJECTED]}, TURNS),
    "conversational, implicit prompt": ({"chosen": [USER, CHOSEN], "rejected": [USER, REJECTED]}, TURNS),
    "transcript (Human, Assistant)": (
        {
            "chosen": "\n\nHuman: Name a prime.\n\nAssistant: 7 is prime.",
            "rejected": "\n\nHuman: Name a prime.\n\nAssistant: 9 is prime.",
        },
        TURNS,
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_recognised_by_itself(shape):
    row, conversations = SHAPES[shape]
    preference = parsed(row)
    assert preference.shape == shape
    assert preference.conversations() == conversations
    assert preference.margin is None


@pytest.mark.parametrize("prompt", ["Name a prime.", [USER]])
def test_a_prompt_that_the_turns_repeat_is_there_once(prompt):
    preference = parsed({"prompt": prompt, "chosen": [USER, CHOSEN], "rejected": [USER, REJECTED]})
    assert preference.conversations() == TURNS


SPACED = {"role": "user", "content": "Name a prime. "}
BIGGER = {"role": "user", "content": "A bigger one?"}
HUMAN = "\n\nHuman: Name a prime.\n\nAssistant:"
REPEATED = {
    "a space at the end": ("Name a prime. ", [USER, CHOSEN], [USER, REJECTED], [USER]),
    "a space in the turns": ([USER], [SPACED, CHOSEN], [SPACED, REJECTED], [SPACED]),
    "a system turn that only the turns have": (
        "Name a prime.",
        [SYSTEM, USER, CHOSEN],
        [SYSTEM, USER, REJECTED],
        [SYSTEM, USER],
    ),
    "the last question of several": (
        "A bigger one?",
        [USER, CHOSEN, BIGGER, CHOSEN],
        [USER, CHOSEN, BIGGER, REJECTED],
        [USER, CHOSEN, BIGGER],
    ),
    "transcripts beside a transcript": (HUMAN, f"{HUMAN} 7 is prime.", f"{HUMAN} 9 is prime.", [USER]),
    "transcripts beside a question": ("Name a prime.", f"{HUMAN} 7 is prime.", f"{HUMAN} 9 is prime.", [USER]),
    "all but the system turn": ([SYSTEM, USER], [USER, CHOSEN], [USER, REJECTED], [SYSTEM, USER]),
    "one side": ("Name a prime.", [USER, CHOSEN], [REJECTED], [USER]),
    "one side, the other a text": ("Name a prime.", [USER, CHOSEN], "9 is prime.", [USER]),
    "one side, with a system turn": ("Name a prime.", [REJECTED], [SYSTEM, USER, CHOSEN], [SYSTEM, USER]),
    "conversations beside an empty prompt": ("", [USER, CHOSEN], [USER, REJECTED], [USER]),
}


@pytest.mark.parametrize("form", REPEATED)
def test_a_prompt_that_responses_repeat_is_read_once(form):
    prompt, chosen, rejected, before = REPEATED[form]
    conversations = parsed({"prompt": prompt, "chosen": chosen, "rejected": rejected}).conversations()
    assert [turns for turns, _ in conversations] == [before, before]
    assert {answer for _, answer in conversations} == {"7 is prime.", "9 is prime."}


def test_an_answer_that_says_its_question_later_stays_whole():
    turns = [CHOSEN, USER, CHOSEN]
    preference = parsed({"prompt": [USER], "chosen": turns, "rejected": [REJECTED]})
    assert preference.conversations()[0] == ([USER, CHOSEN, USER], "7 is prime.")
    beside = parsed({"prompt": HUMAN, "chosen": " 7", "rejected": "\n\nAssistant: 9"})
    assert [answer for _, answer in beside.conversations()] == [" 7", "\n\nAssistant: 9"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "Other?", "chosen": [USER, CHOSEN], "rejected": [REJECTED]},
            "'chosen': begins with a turn of the user",
        ),
        (
            {"prompt": [USER], "chosen": [SYSTEM, BIGGER, CHOSEN], "rejected": [REJECTED]},
            "'chosen': begins with a turn of the system",
        ),
        (
            {"prompt": [USER], "chosen": [SYSTEM, USER, CHOSEN], "rejected": [USER, REJECTED]},
            "'rejected': begins with other turns than 'chosen'",
        ),
    ],
)
def test_a_response_with_another_question_is_refused(row, message):
    with pytest.raises(DataError, match=f"file:7: field {message}"):
        parsed(row)


def test_turns_before_the_last_may_differ():
    other = {"role": "user", "content": "Another one?"}
    preference = parsed({"chosen": [SYSTEM, USER, CHOSEN, other, CHOSEN], "rejected": [SYSTEM, USER, REJECTED]})
    assert [turn.model_dump() for turn in preference.prompt] == [SYSTEM, USER]
    assert preference.conversations() == [
        ([SYSTEM, USER, CHOSEN, other], "7 is prime."),
        ([SYSTEM, USER], "9 is prime."),
    ]


def test_a_transcript_keeps_its_turns():
    opening = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: A prime?"
    preference = parsed({"chosen": f"{opening}\n\nAssistant: 7", "rejected": f"{opening}\n\nAssistant: 9"})
    assert [turn.role for turn in preference.prompt] == ["user", "assistant", "user"]
    assert [response[-1].content for response in preference.responses] == ["7", "9"]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("one two", "one three", "one "),
        ("one", "one two", ""),
        ("a b", "a b c", "a "),
        ("same", "same", ""),
        ("x", "y", ""),
    ],
)
def test_the_prompt_that_texts_share_ends_with_a_word_and_leaves_a_response(chosen, rejected, prompt):
    preference = parsed({"chosen": chosen, "rejected": rejected})
    assert preference.prompt == prompt
    assert all(preference.responses)
    assert [preference.prompt + response for response in preference.responses] == [chosen, rejected]


def test_identical_conversations_still_have_a_last_turn_to_judge():
    preference = parsed({"chosen": [USER, CHOSEN], "rejected": [USER, CHOSEN]})
    assert preference.conversations() == [TURNS[0], TURNS[0]]


def test_rankings_scores_subsets_and_other_names():
    ranking = parsed({"prompt": "p", "ranked": ["best", "middle", "worst"], "subset": "maths"})
    assert ranking.responses == ("best", "middle", "worst")
    assert (ranking.subset, ranking.shape) == ("maths", "standard, explicit prompt, ranked")
    scored = parsed({"prompt": "p", "chosen": "a", "rejected": "b", "chosen_score": 8, "rejected_score": 5.5})
    assert scored.margin == 2.5
    assert parsed({"prompt": "p", "chosen": "a", "rejected": "b", "margin": "0.5"}).margin == 0.5  # as in CSV
    renamed = parsed({"instruction": "p", "output_1": "a", "rejected": "b"}, prompt="instruction", chosen="output_1")
    assert renamed.conversations() == [("p", "a"), ("p", "b")]
    assert parsed({"prompt": "p", "chosen": "a", "rejected": "b", "margin": None, "ranked": None}).subset == ""


GOOD = {"prompt": "p", "chosen": "a", "rejected": "b"}
BAD = [
    ({"prompt": "p", "chosen": "a"}, "'rejected': missing"),
    ({"prompt": "p"}, "'chosen': missing"),
    ({**GOOD, "ranked": ["a", "b"]}, "'ranked': given together with"),
    ({"prompt": "p", "ranked": ["a"]}, "'ranked': .*at least 2"),
    ({**GOOD, "prompt": 3}, "'prompt.*'"),
    ({**GOOD, "chosen": ""}, "'chosen.*': .*at least 1"),
    ({**GOOD, "chosen": 3}, "'chosen.*'"),
    ({**GOOD, "rejected": []}, "'rejected.*': .*at least 1"),
    ({**GOOD, "margin": float("nan")}, "'margin': .*finite"),
    ({**GOOD, "margin": float("inf")}, "'margin': .*finite"),
    ({**GOOD, "chosen_score": 1.0, "rejected_score": 2.0}, "'chosen_score': 1.0 is below rejected_score 2.0"),
    ({**GOOD, "prompt": [{"role": "user"}]}, "'prompt.*content': Field required"),
    ({**GOOD, "prompt": [{**USER, "tool_calls": [1]}]}, "'prompt.0': .*tool_calls must be a list of objects"),
    ({**GOOD, "prompt": [{**USER, "content": [{"type": "image_url"}]}]}, "'prompt.0.content': .*type 'image_url'"),
    ({**GOOD, "prompt": [{**USER, "content": []}]}, "'prompt.0.content': .*empty list of parts"),
    ({**GOOD, "tools": "{"}, "'tools': .*list of tools as JSON"),
    ({**GOOD, "prompt": [{"from": "function_call", "value": "{"}]}, "'prompt.0': .*must be a call as JSON"),
    ({"prompt": [USER], "chosen": [USER], "rejected": [REJECTED]}, "'chosen': must end with a turn of the assistant"),
    (
        {"prompt": [USER], "chosen": [{**CHOSEN, "content": ""}], "rejected": [REJECTED]},
        "'chosen': the last turn is empty",
    ),
    ({**GOOD, "subset": 3}, "'subset'"),
]


@pytest.mark.parametrize(("row", "message"), BAD, ids=[message for _, message in BAD])
def test_a_bad_row_is_refused_by_place_and_field(row, message):
    with pytest.raises(DataError, match=f"file:7: field {message}"):
        parsed(row)


def test_errors_use_the_names_in_the_data():
    with pytest.raises(DataError, match="field 'output_1'"):
        parsed({"prompt": "p", "rejected": "b"}, chosen="output_1")
    with pytest.raises(DataError, match="field 'output_1"):
        parsed({"prompt": "p", "output_1": 3, "rejected": "b"}, chosen="output_1")
