"""Joining a Ray, or starting one, and where it and Serve listen. Knows nothing of what runs in it."""

from __future__ import annotations

import os
import socket
from typing import Any

import ray
from ray._common.network_utils import build_address
from ray._common.tls_utils import add_port_to_grpc_server
from ray._private import ray_constants, services

ANSWER_TIMEOUT_S = 5.0


def address_to_join() -> str | None:
    """The Ray that was meant: that of ``RAY_ADDRESS``, or the one that ``ray start`` began here, if it still answers.

    Ray itself would wait minutes for one that has gone, or, asked for any, join the Ray of somebody else's job.
    """
    address = os.environ.get(ray_constants.RAY_ADDRESS_ENVIRONMENT_VARIABLE)
    if address:
        return None if address == "local" else address
    address = services.find_bootstrap_address(None)
    if not address:
        return None
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_TIMEOUT_S).close()
    except OSError:
        return None
    return address


def init_ray(**options: Any) -> None:
    """Joins a Ray (see `address_to_join`) or starts one, as ``ray.init`` does, but one that listens on loopback alone.

    Ray's servers listen at their node's address, and ``ray.init`` turns a loopback address that it is given into one
    that other machines reach. Where Ray takes a machine for one that cannot be part of a cluster, as it does macOS and
    Windows (environment variable ``RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER``), it does not; and nobody joins a Ray that
    lives as long as its driver. The same holds for joining such a Ray at its loopback address.

    Args:
        **options: Of ``ray.init``.

    Raises:
        ConnectionError: ``ray.init``'s, where there is no Ray to join.
    """
    options.setdefault("address", address_to_join() or "local")
    usual = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        ray.init(**options)
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = usual


def listen_at_node_address() -> None:
    """Keeps the server that a Serve replica is about to open at its node's address; to be called as the replica starts.

    Every replica opens one for pickled calls of other replicas (``ray.serve._private.replica``, which has no option for
    it), by itself at every address of the machine.
    """
    from ray.serve._private import replica

    def at_node_address(server: Any, address: str) -> int:
        here = build_address(ray.util.get_node_ip_address(), address.rpartition(":")[2])
        port: int = add_port_to_grpc_server(server, here)
        return port

    replica.add_port_to_grpc_server = at_node_address
