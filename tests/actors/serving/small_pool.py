"""A Serve application with the shape of a pool and without a critic, for tests of its configuration."""

from ray import serve
from ray.serve.handle import DeploymentHandle


@serve.deployment(name="Scorer", ray_actor_options={"num_cpus": 0})
class Replica:
    """Takes any configuration."""

    def reconfigure(self, user_config: object) -> None:
        """Takes a configuration."""


@serve.deployment(name="Gateway", ray_actor_options={"num_cpus": 0})
class Gateway:
    """Takes the place of the HTTP endpoints."""

    def __init__(self, _: DeploymentHandle) -> None: ...


app = Gateway.bind(Replica.bind())  # type: ignore[attr-defined]
