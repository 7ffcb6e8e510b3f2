"""Names of Ray that its public interface does not have, all in this one file: what may change with the next Ray.

A name is imported when it is first used, because some of these modules take seconds. Knows nothing about their use.
"""

from __future__ import annotations

import pkgutil
from typing import Any

LOCATIONS = {
    "CHECKPOINT_MANAGER_SNAPSHOT_FILENAME": "ray.train.v2._internal.constants:CHECKPOINT_MANAGER_SNAPSHOT_FILENAME",
    "CollectiveTimeoutError": "ray.train.v2._internal.exceptions:CollectiveTimeoutError",
    "DefaultFailurePolicy": "ray.train.v2._internal.execution.failure_handling:DefaultFailurePolicy",
    "FailureDecision": "ray.train.v2._internal.execution.failure_handling:FailureDecision",
    "PlacementGroupCleaner": "ray.train.v2._internal.callbacks.placement_group_callback:PlacementGroupCleaner",
    "PlacementGroupCleanerCallback": (
        "ray.train.v2._internal.callbacks.placement_group_callback:PlacementGroupCleanerCallback"
    ),
    "TorchBackend": "ray.train.torch.config:_TorchBackend",
    "WorkerGroupStartupFailedError": "ray.train.v2._internal.exceptions:WorkerGroupStartupFailedError",
    "WorkerGroupStartupTimeoutError": "ray.train.v2._internal.exceptions:WorkerGroupStartupTimeoutError",
    "WorkerHealthCheckFailedError": "ray.train.v2._internal.exceptions:WorkerHealthCheckFailedError",
    "WorkerHealthCheckTimeoutError": "ray.train.v2._internal.exceptions:WorkerHealthCheckTimeoutError",
    "add_port_to_grpc_server": "ray._common.tls_utils:add_port_to_grpc_server",
    "build_address": "ray._common.network_utils:build_address",
    "find_bootstrap_address": "ray._private.services:find_bootstrap_address",
    "get_serve_client": "ray.serve.context:_get_global_client",
    "placement_group_callback": "ray.train.v2._internal.callbacks.placement_group_callback",
    "ray_constants": "ray._private.ray_constants",
    "ray_state": "ray._private.state",
    "serve_replica": "ray.serve._private.replica",
    "set_torch_distributed_env_vars": "ray.train.torch.config:_set_torch_distributed_env_vars",
}


def __getattr__(name: str) -> Any:
    """Imports one of the names above."""
    if name not in LOCATIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return pkgutil.resolve_name(LOCATIONS[name])
