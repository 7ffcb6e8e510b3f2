"""Client for reward files of other trainers, which can only configure it by environment variables."""

from __future__ import annotations

import os
import threading
from functools import lru_cache
from pathlib import Path

from rlhf_critic.errors import ConfigError
from rlhf_critic.files import read_text
from rlhf_critic.scoring.client import ScorerClient
from rlhf_critic.scoring.http_client import connect_http

URL = "RLHF_CRITIC_URL"
TOKEN_FILE = "RLHF_CRITIC_TOKEN_FILE"

_connecting = threading.Lock()  # trainers call from many threads at once


def client_from_environment() -> ScorerClient:
    """Returns this process's client of the pool at ``RLHF_CRITIC_URL``.

    If the pool requires a token, ``RLHF_CRITIC_TOKEN_FILE`` names the file that holds it. A variable with the token
    itself would be visible to other processes.

    Raises:
        ConfigError: The address is not set, or the file cannot be read.
    """
    url = os.environ.get(URL)
    if not url:
        raise ConfigError(f"set {URL} to the pool's address, such as http://127.0.0.1:8000")
    with _connecting:
        return _client(url, os.environ.get(TOKEN_FILE), os.getpid())


@lru_cache
def _client(url: str, token_file: str | None, process: int) -> ScorerClient:
    """Connects once per process. ``process`` is a cache key, because a fork copies the client without its thread."""
    try:
        token = read_text(Path(token_file).expanduser()).strip() if token_file else None
    except OSError as error:
        raise ConfigError(f"{TOKEN_FILE}: {token_file} cannot be read: {error}") from error
    return connect_http(url, token)
