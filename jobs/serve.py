"""``python -m jobs.serve CHECKPOINT``: rewards from a pool of scorers on Ray Serve.

Runs alone (it starts a local Ray and stays) or against a cluster, by ``ray job submit`` or ``RAY_ADDRESS``.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from pathlib import Path

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from rich.console import Console

from actors.runtime.session import address_to_join, init_ray
from actors.serving import control
from jobs.cli import command, run_job
from rlhf_critic.config.base import parse_command_line
from rlhf_critic.config.serve import ServeJobConfig
from rlhf_critic.errors import ConfigError

SHORTEST_TOKEN = 16


def main() -> None:
    """Does what the options say, and says what runs where."""
    config = parse_command_line(ServeJobConfig, prog=command("serve"))
    console = Console(stderr=True)
    started_ray = join_ray(may_start=not (config.stop or config.publish))
    if config.stop:
        control.stop(config.app)
        console.print(f"the pool {config.app!r} has ended")
        return
    with console.status("checking the critic") as status:
        if config.publish:
            version = control.publish(config.app, str(config.checkpoint), config.start_timeout_s, status.update)
            console.print(f"published: every replica of {config.app!r} serves {version}", highlight=False)
            return
        url, version, authenticated = run_pool(config, status.update)
    console.print(f"[bold]{config.app}[/bold] serves {version} at {url}", highlight=False)
    console.print(how_to_call(config, url, authenticated), markup=False, highlight=False, soft_wrap=True)
    if started_ray:
        console.print("Ctrl-C ends it.")
        wait_for_end(config.app)


def join_ray(may_start: bool) -> bool:
    """Joins the Ray cluster that is there, or starts a Ray of its own; returns whether it did.

    Raises:
        ConfigError: There is none, and none may be started.
    """
    if ray.is_initialized():
        return False
    address = address_to_join()
    if address is None and may_start:
        init_ray(address="local", logging_level="WARNING", log_to_driver=False)
        return True
    try:
        # A pool that runs alone has a Ray that nobody else knows of; Ray finds it among the processes of this machine.
        init_ray(address=address or "auto", logging_level="WARNING", log_to_driver=False)
    except ConnectionError as error:
        raise ConfigError(
            f"no Ray cluster could be joined ({error}): set RAY_ADDRESS, or submit this as a job to the pool's cluster"
        ) from error
    return False


def run_pool(config: ServeJobConfig, progress: control.Progress) -> tuple[str, str, bool]:
    """Runs the pool, or changes the one that runs.

    Returns:
        Its URL, the version it serves and whether callers must show a token.

    Raises:
        CriticError: See `actors.serving.control`.
    """
    authenticated = config.auth == "on" or (config.auth == "auto" and not control.is_loopback(config.host))
    scorer = control.checked(config, str(config.checkpoint))
    token_sha256 = hashlib.sha256(read_token(config.token_file).encode()).hexdigest() if authenticated else None
    url = control.start_serve(config, authenticated)
    return url, control.deploy(config, scorer, token_sha256, progress), authenticated


def read_token(path: str) -> str:
    """The bearer token of a file, which is made where it is missing: for its owner alone.

    Raises:
        ConfigError: The file cannot be read or made, others may read it, or the token is too short to be one.
    """
    file = Path(path).expanduser()
    try:
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as made:
                made.write(secrets.token_urlsafe(32) + "\n")
        if file.stat().st_mode & 0o077:
            raise ConfigError(f"{file}: others may read this token: chmod 600 {file}")
        token = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: no token can be read or made there: {error}; give another --token-file") from error
    if len(token) < SHORTEST_TOKEN:
        raise ConfigError(
            f"{file}: a token of fewer than {SHORTEST_TOKEN} characters can be guessed; delete the file and one is made"
        )
    return token


def how_to_call(config: ServeJobConfig, url: str, authenticated: bool) -> str:
    """A call to try."""
    token = f' -H "Authorization: Bearer $(cat {config.token_file})"' if authenticated else ""
    body = '{"items": [{"prompt": "Name a prime.", "response": "7 is prime."}]}'
    return f"try: curl {url}/score{token} -H 'Content-Type: application/json' -d '{body}'"


def wait_for_end(app: str) -> None:
    """Stays until the pool is gone or the user has had enough; then ends it in order."""
    try:
        while control.is_running(app):
            time.sleep(1)
    except KeyboardInterrupt:
        print("ending the pool")
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    run_job(main, RayError, RayServeException)
