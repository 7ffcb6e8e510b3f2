"""Classifies texts with vLLM on a CPU. Request: ``model``, ``texts``, ``max_length``."""

import json
import sys

from vllm import LLM, PoolingParams


def main():
    """Answers with the numbers without options and with the activation turned off."""
    with open(sys.argv[1], encoding="utf-8") as file:
        request = json.load(file)
    llm = LLM(model=request["model"], runner="pooling", dtype="float32", max_model_len=request["max_length"])
    answer = {
        "as_it_is": [one.outputs.probs[0] for one in llm.classify(request["texts"])],
        "raw": [
            one.outputs.probs[0]
            for one in llm.classify(request["texts"], pooling_params=PoolingParams(use_activation=False))
        ],
    }
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(answer, file)


if __name__ == "__main__":
    main()
