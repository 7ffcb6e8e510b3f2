"""Rules that score responses, for scorers to import."""

import os
import time
import uuid
from pathlib import Path

from tests.helpers import wait_until

HANG, DIE = "hang", "die"  # responses


def exclaims(prompts, responses):
    """Returns the share of exclamation marks among characters that are not spaces."""
    return [response.count("!") / max(1, len("".join(response.split()))) for response in responses]


def hangs(prompts, responses):
    """Returns zeros, or never returns if a response asks for it."""
    while HANG in responses:
        time.sleep(60)
    return [0.0] * len(responses)


def dies(prompts, responses):
    """Returns zeros, or ends the process if a response asks for it."""
    if DIE in responses:
        os._exit(1)
    return [0.0] * len(responses)


def exclaims_slowly(prompts, responses):
    """The same after a while, so that something can happen meanwhile; or when two calls are there at once.

    Those are calls whose prompts are ``meet DIRECTORY``, an empty one.
    """
    word, _, place = prompts[0].partition(" ")
    if word == "meet":
        (Path(place) / uuid.uuid4().hex).touch()
        wait_until(lambda: len(list(Path(place).iterdir())) >= 2, "another call", 60)
    time.sleep(0.3)
    return exclaims(prompts, responses)


def echoes(prompts, transcripts):
    """Answers the first turn with a word, and rewards each turn by its share of exclamation marks."""
    rewards = exclaims(prompts, [texts[-1] for texts in transcripts])
    return [("yes" if len(texts) == 1 else None, reward) for texts, reward in zip(transcripts, rewards, strict=True)]
