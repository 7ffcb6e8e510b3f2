"""``python -m jobs.serve CHECKPOINT``: serves rewards from a pool of scorers on Ray Serve.

Joins a Ray cluster (``ray job submit``, ``RAY_ADDRESS``), or starts a local Ray and runs until it is interrupted.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import time
from contextlib import suppress
from pathlib import Path

import ray
from ray import serve
from rich.console import Console

from actors.runtime.session import address_to_join, init_ray
from actors.serving import control
from jobs.cli import command, run_job
from rlhf_critic.config.base import parse_command_line
from rlhf_critic.config.serve import ServeJobConfig
from rlhf_critic.data.judgements import prepare_file
from rlhf_critic.errors import ConfigError
from rlhf_critic.files import read_text

logger = logging.getLogger(__name__)

MIN_TOKEN_LENGTH = 16


def main() -> None:
    """Starts, changes or stops a pool, and reports its URL and version."""
    config = parse_command_line(ServeJobConfig, prog=command("serve"))
    console = Console(stderr=True)
    started_ray = join_ray(may_start=not (config.stop or config.publish))
    if config.stop:
        control.stop(config.app)
        console.print(f"stopped the pool {config.app!r}")
        return
    with console.status("checking the critic") as status:
        if config.publish:
            version = control.publish(
                config.app, str(config.checkpoint), config.start_timeout_s, status.update, config.encoding
            )
            console.print(f"published: every replica of {config.app!r} serves {version}", highlight=False)
            return
        url, version, authenticated = run_pool(config, status.update)
    console.print(f"[bold]{config.app}[/bold] serves {version} at {url}", highlight=False)
    console.print(how_to_call(config, url, authenticated), markup=False, highlight=False, soft_wrap=True)
    if started_ray:
        console.print("Press Ctrl-C to stop it.")
        wait_for_end(config.app)


def join_ray(may_start: bool) -> bool:
    """Joins a running Ray cluster, or starts a local one; returns whether it started one.

    Raises:
        ConfigError: No cluster can be joined, and ``may_start`` is False.
    """
    if ray.is_initialized():
        return False
    address = address_to_join()
    if address is None and may_start:
        init_ray(address="local", log_to_driver=False)
        return True
    try:
        # "auto" finds the local Ray of another jobs.serve among the processes of this machine.
        init_ray(address=address or "auto", log_to_driver=False)
    except ConnectionError as error:
        raise ConfigError(
            f"no Ray cluster could be joined ({error}): set RAY_ADDRESS, or submit this as a job to the pool's cluster"
        ) from error
    return False


def run_pool(config: ServeJobConfig, progress: control.Progress) -> tuple[str, str, bool]:
    """Starts the pool, or changes the running one.

    Returns:
        The pool's URL, the version it serves, and whether callers must send a token.

    Raises:
        CriticError: See `actors.serving.control`.
    """
    authenticated = config.auth == "on" or (config.auth == "auto" and not control.is_loopback(config.host))
    scorer = control.checked(config, str(config.checkpoint))
    if config.collect is not None:
        config = config.model_copy(update={"collect": prepare_file(config.collect)})
    token_sha256 = hashlib.sha256(read_token(config.token_file).encode()).hexdigest() if authenticated else None
    url = control.start_serve(config, authenticated)
    return url, control.deploy(config, scorer, token_sha256, progress), authenticated


def read_token(path: str) -> str:
    """Returns the bearer token in a file. Creates a missing file, readable by its owner only.

    Raises:
        ConfigError: The file cannot be read or created, other users can read it, or the token is too short.
    """
    file = Path(path).expanduser()
    try:
        if not file.exists():
            _create_token(file)
        if file.stat().st_mode & 0o077:
            raise ConfigError(f"{file}: other users can read this token: run chmod 600 {file}")
        token = read_text(file).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot read or create the token: {error}; use another --token-file") from error
    if len(token) < MIN_TOKEN_LENGTH:
        raise ConfigError(
            f"{file}: a token of fewer than {MIN_TOKEN_LENGTH} characters can be guessed; delete the file for a new one"
        )
    return token


def _create_token(file: Path) -> None:
    """Creates a token file. If two processes do so at once, both use the first one's token."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    mine = file.with_name(f".{file.name}-{secrets.token_hex(8)}")
    try:
        with os.fdopen(os.open(mine, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as created:
            created.write(secrets.token_urlsafe(32) + "\n")
        with suppress(FileExistsError):
            os.link(mine, file)
    finally:
        mine.unlink(missing_ok=True)


def how_to_call(config: ServeJobConfig, url: str, authenticated: bool) -> str:
    """Returns a command that calls the pool."""
    # From a file, because a command line is readable by every user of this machine.
    token = f' -H @<(echo "Authorization: Bearer $(cat {config.token_file})")' if authenticated else ""
    body = '{"items": [{"prompt": "Name a prime.", "response": "7 is prime."}]}'
    return f"try: curl {url}/score{token} -H 'Content-Type: application/json' -d '{body}'"


def wait_for_end(app: str) -> None:
    """Waits until the pool is stopped or the user presses Ctrl-C, then shuts down Serve and Ray."""
    try:
        while control.is_running(app):
            time.sleep(1)
    except KeyboardInterrupt:
        logger.info("interrupted; stopping the pool app=%s", app)
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    run_job(main)
