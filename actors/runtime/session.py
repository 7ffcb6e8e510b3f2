"""How a process joins or starts Ray, and where Ray and Serve listen. Knows nothing about what runs there."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import ray

from actors.runtime.ray_internals import add_port_to_grpc_server, build_address, find_bootstrap_address, ray_constants
from rlhf_critic.errors import ConfigError
from rlhf_critic.logs import level_of_libraries


def address_to_join() -> str | None:
    """Returns the address of the Ray to join: ``RAY_ADDRESS``, or the one that ``ray start`` began here, if it answers.

    Ray itself would wait minutes for a Ray that has ended, or join the Ray of somebody else's job if asked for any.
    """
    address = os.environ.get(ray_constants.RAY_ADDRESS_ENVIRONMENT_VARIABLE)
    if address:
        return None if address == "local" else address
    address = find_bootstrap_address(None)
    if not address:
        return None
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5.0).close()
    except OSError:
        return None
    return address


def init_ray(**options: Any) -> None:
    """Joins a Ray (see `address_to_join`), or starts one that listens on loopback only.

    Ray's servers listen at their node's address, and ``ray.init`` replaces a loopback address by one that other
    machines can reach. It keeps loopback where a machine cannot be part of a cluster: on macOS and Windows (environment
    variable ``RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER``). This function sets that case for the call, because nobody joins a
    Ray that ends with its driver. The same holds when such a Ray is joined at its loopback address.

    Args:
        **options: Options of ``ray.init``.

    Raises:
        ConnectionError: There is no Ray to join; from ``ray.init``.
        ConfigError: Ray cannot write its files.
    """
    options.setdefault("address", address_to_join() or "local")
    options.setdefault("logging_level", level_of_libraries())
    usual = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        ray.init(**options)
    except ConnectionError:
        raise
    except OSError as error:
        raise ConfigError(_why_not_started(error)) from error
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = usual


def _why_not_started(error: OSError) -> str:
    if "AF_UNIX" in str(error):
        return (
            f"TMPDIR {tempfile.gettempdir()}: too long, because a path of Ray's sockets below it may have "
            "107 bytes; set RAY_TMPDIR to a short directory, such as /tmp"
        )
    return (
        f"Ray could not start: {error}. It writes a token to HOME ({Path.home() / '.ray'}) and its files to TMPDIR "
        f"({tempfile.gettempdir()}): set these variables to directories that can be written"
    )


def listen_at_node_address() -> None:
    """Makes the server that a Serve replica opens listen at its node's address; call it as the replica starts.

    Every replica opens a server for pickled calls from other replicas, by default at every address of the machine.
    Serve has no option for it.
    """
    from actors.runtime.ray_internals import serve_replica  # seconds of import

    def at_node_address(server: Any, address: str) -> int:
        here = build_address(ray.util.get_node_ip_address(), address.rpartition(":")[2])
        return int(add_port_to_grpc_server(server, here))

    serve_replica.add_port_to_grpc_server = at_node_address
