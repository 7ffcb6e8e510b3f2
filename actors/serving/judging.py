"""The endpoint that saves judged preferences in the file that the server's operator named.

Knows nothing about replicas, and leaves authentication and limits to `actors.serving.http_api`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter

from rlhf_critic.data.conversation import to_prompt
from rlhf_critic.data.judgements import append_line, preference_line
from rlhf_critic.errors import DataError, ScorerRejected, ScorerUnavailable
from rlhf_critic.scoring.http_schema import JudgementRequest, JudgementResponse
from rlhf_critic.scoring.items import Conversation

if TYPE_CHECKING:
    from actors.serving.http_api import ScoringService

logger = logging.getLogger(__name__)


def add_judging(router: APIRouter, service: Callable[[], ScoringService], errors: dict[int | str, Any]) -> None:
    """Adds ``POST /judgements`` to a router. ``errors`` describes the answers that are not scores."""

    @router.post("/judgements", responses=errors)
    async def judge(request: JudgementRequest) -> JudgementResponse:
        """Saves a person's preference, with the rewards that the critic gives the two answers now."""
        file = service().settings.collect
        if file is None:
            raise ScorerRejected("not_collecting", "this pool saves no judgements: start it with --collect FILE")
        prompt = to_prompt(request.prompt)
        pair = [Conversation(prompt, request.chosen), Conversation(prompt, request.rejected)]
        scores = await service().score(list(pair), False, None)
        chosen_reward, rejected_reward = scores.rewards_S.tolist()
        answer = JudgementResponse(
            model_version=scores.model_version, chosen_reward=chosen_reward, rejected_reward=rejected_reward
        )
        judged_at = datetime.now(timezone.utc).isoformat(timespec="seconds")
        about = {"judge": request.judge, "judged_at": judged_at, **answer.model_dump()}
        try:
            line = preference_line(prompt, request.chosen, request.rejected, **about)
        except DataError as error:
            raise ScorerRejected("not_a_preference", str(error)) from error
        try:
            await asyncio.to_thread(append_line, file, line)
        except OSError as error:
            logger.error("judgement not saved file=%s error=%s", file, error)
            raise ScorerUnavailable(f"the judgement could not be saved: {error.strerror or error}") from error
        return answer
