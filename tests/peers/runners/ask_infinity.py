"""Classifies texts with infinity. Request: ``model``, ``texts``."""

import asyncio
import json
import sys

from infinity_emb import AsyncEngineArray, EngineArgs

with open(sys.argv[1], encoding="utf-8") as file:
    request = json.load(file)


async def main():
    """Answers with the scores as they are and with the raw ones."""
    arguments = EngineArgs(
        model_name_or_path=request["model"],
        engine="torch",
        device="cpu",
        dtype="float32",
        bettertransformer=False,
        model_warmup=False,
    )
    engines = AsyncEngineArray.from_args([arguments])
    answer = {}
    engine = engines[0]
    async with engine:
        for name, raw in {"as_it_is": False, "raw": True}.items():
            classes, _ = await engine.classify(sentences=request["texts"], raw_scores=raw)
            answer[name] = [one[0]["score"] for one in classes]
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(answer, file)


if __name__ == "__main__":
    asyncio.run(main())
