"""Rules that judge responses, for scorers to import."""

import time


def exclaims(prompts, responses):
    """The share of exclamation marks among what is no space."""
    return [response.count("!") / max(1, len("".join(response.split()))) for response in responses]


def exclaims_slowly(prompts, responses):
    """The same after a while, so that something can happen meanwhile."""
    time.sleep(0.3)
    return exclaims(prompts, responses)
