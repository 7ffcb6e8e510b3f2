"""The Kubernetes manifests: KubeRay knows their fields, every actor fits a pod, and no port is open."""

from __future__ import annotations

import hashlib
import shlex

import jsonschema
import pytest
import yaml
from ray._common.utils import import_attr
from ray.serve.schema import ServeDeploySchema

from actors.serving import control
from actors.serving.deployment import app
from actors.serving.http_api import HttpSettings
from rlhf_critic.config.serve import ScorerConfig, ServeJobConfig
from rlhf_critic.config.train import TrainJobConfig
from rlhf_critic.errors import ConfigError
from tests.cluster.clusters import (
    CLUSTER,
    RAY,
    RAY_MANIFESTS,
    VERSION,
    autoscaling,
    demand,
    job_config,
    manifest,
    nodes_for,
    ray_cluster,
    spot_types,
    workers,
)
from tests.cluster.fields import MANIFESTS

NAMES = sorted(path.stem for path in (CLUSTER / "kuberay").glob("*.yaml"))
CLUSTERS = tuple(RAY_MANIFESTS)
SERVICE_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"


def pods(name):
    """Returns the pod templates of a cluster, the head first."""
    cluster = ray_cluster(name)
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def serve_config():
    """Returns the deployed application as Ray Serve parses it."""
    return ServeDeploySchema.model_validate(yaml.safe_load(manifest("rayservice-scorers")["spec"]["serveConfigV2"]))


@pytest.mark.parametrize("name", NAMES)
def test_kuberay_knows_every_field(name):
    jsonschema.validate(manifest(name), MANIFESTS[manifest(name)["kind"]])


@pytest.mark.parametrize(
    ("path", "slip"),
    [
        (["spec"], "enableInTreeAutoscale"),
        (["spec", "headGroupSpec", "template", "spec", "containers", 0], "resource"),
        (["spec", "workerGroupSpecs", 0, "template", "spec"], "nodeSelectors"),
    ],
)
def test_a_misspelt_field_is_found(path, slip):
    cluster = part = manifest("raycluster")
    for key in path:
        part = part[key]
    part[slip] = {}
    with pytest.raises(jsonschema.ValidationError, match=slip):
        jsonschema.validate(cluster, MANIFESTS["RayCluster"])


@pytest.mark.parametrize("name", CLUSTERS)
def test_tokens_are_on(name):
    assert ray_cluster(name)["authOptions"] == {"mode": "token"}


@pytest.mark.parametrize("name", CLUSTERS)
def test_nothing_is_reached_from_outside(name):
    head = ray_cluster(name)["headGroupSpec"]
    assert head["serviceType"] == "ClusterIP"
    assert head["enableIngress"] is False
    assert "serveService" not in manifest(name)["spec"]


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_head_does_no_work(name):
    config = autoscaling(name)
    head = config["available_node_types"][config["head_node_type"]]
    assert {kind: head["resources"].get(kind, 0) for kind in ("CPU", "GPU")} == {"CPU": 0, "GPU": 0}


def test_the_manifests_have_one_head():
    """Kubernetes has no includes, so repeated parts must stay equal."""
    cluster, job, service = (pods(name)[0] for name in ("raycluster", "rayjob-train", "rayservice-scorers"))
    assert job == cluster
    (container,) = service["containers"]
    ports = [port for port in container["ports"] if port["name"] != "serve"]
    assert {**service, "containers": [{**container, "ports": ports}]} == cluster


@pytest.mark.parametrize("name", CLUSTERS)
def test_groups_grow_from_nothing_and_go_when_idle(name):
    cluster = ray_cluster(name)
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["idleTimeoutSeconds"] > 0
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] == group["replicas"] == 0 < group["maxReplicas"]


@pytest.mark.parametrize("name", CLUSTERS)
def test_pods_run_without_privileges(name):
    for pod in pods(name):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 1000
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }


@pytest.mark.parametrize("name", CLUSTERS)
def test_pods_get_what_they_may_use(name):
    for pod in pods(name):
        for container in pod["containers"]:
            assert container["resources"]["requests"] == container["resources"]["limits"]


@pytest.mark.parametrize("name", CLUSTERS)
def test_every_group_has_nodes_of_its_own(name):
    for group in ray_cluster(name)["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        assert pod["nodeSelector"] == {"rlhf-critic/pool": group["groupName"]}
        wants_gpu = "nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"]
        assert wants_gpu == any(one["key"] == "nvidia.com/gpu" for one in pod.get("tolerations", ()))


def test_only_scorers_may_be_taken_away():
    assert spot_types("raycluster") == {"scorers"}


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_autoscaler_alone_holds_rights_in_kubernetes(name):
    """The head runs the drivers of jobs, which is anyone's code, beside the autoscaler."""
    head, *others = pods(name)
    assert all(pod["automountServiceAccountToken"] is False for pod in (head, *others))
    (mount,) = ray_cluster(name)["autoscalerOptions"]["volumeMounts"]
    (volume,) = (one for one in head["volumes"] if one["name"] == mount["name"])
    assert mount == {"name": volume["name"], "mountPath": SERVICE_ACCOUNT, "readOnly": True}
    paths = {path for source in volume["projected"]["sources"] for path in paths_of(source)}
    assert paths == {"token", "ca.crt", "namespace"}, "what Kubernetes' own mount contains"
    for pod in (head, *others):
        for container in pod["containers"]:
            assert mount["name"] not in [one["name"] for one in container["volumeMounts"]]


def paths_of(source):
    """Returns the files of one source of a projected volume."""
    ((_, told),) = source.items()
    return [told["path"]] if "path" in told else [item["path"] for item in told["items"]]


@pytest.mark.parametrize("name", CLUSTERS)
def test_all_pods_share_the_claimed_storage(name):
    claim = manifest("pvc")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in pods(name):
        (volume,) = (one for one in pod["volumes"] if "persistentVolumeClaim" in one)
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        for container in pod["containers"]:
            (mount,) = container["volumeMounts"]
            assert (mount["name"], mount["mountPath"]) == (volume["name"], "/mnt/rlhf")


def test_scorers_that_answer_strangers_cannot_write_what_trainers_read():
    _, *scorers = pods("rayservice-scorers")
    for pod in scorers:
        assert [mount["readOnly"] for one in pod["containers"] for mount in one["volumeMounts"]] == [True]


def test_only_rays_pods_and_named_callers_connect_to_rays_pods():
    """Everything else in Kubernetes is refused, whatever token it has."""
    policy = manifest("networkpolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress"]
    own, *others = policy["ingress"]
    assert own == {"from": [{"podSelector": policy["podSelector"]}]}
    ports = {name: port["containerPort"] for pod in pods("rayservice-scorers") for name, port in ports_of(pod)}
    assert [entry["ports"] for entry in others] == [
        [{"protocol": "TCP", "port": port}] for port in (ports["dashboard"], ports["serve"], 8080)
    ]
    for entry in others:
        # An empty selector is everybody.
        assert all(all(one.values()) and one for one in (peer["podSelector"] for peer in entry["from"]))
    submitter = others[0]["from"][1]["podSelector"]["matchLabels"]["job-name"]
    assert submitter == manifest("rayjob-train")["metadata"]["name"]


def ports_of(pod):
    """Returns the ports of a pod by name."""
    return [(port["name"], port) for container in pod["containers"] for port in container["ports"]]


@pytest.mark.parametrize("name", CLUSTERS)
def test_versions_are_those_of_the_project(name):
    assert ray_cluster(name)["rayVersion"] in RAY.specifier
    assert f"ARG RAY_VERSION={ray_cluster(name)['rayVersion']}\n" in (CLUSTER / "Dockerfile").read_text(
        encoding="utf-8"
    )
    for pod in pods(name):
        assert all(one["image"].endswith(f"/rlhf-critic:{VERSION}") for one in pod["containers"])  # in any registry


def test_the_training_job_is_one_that_its_own_cluster_has_room_for():
    config = job_config(shlex.split(manifest("rayjob-train")["spec"]["entrypoint"]))
    assert isinstance(config, TrainJobConfig)
    config.validate_complete()
    assert config.resume, "it may be tried again, and must go on then"
    assert config.run.storage_path.startswith("/mnt/rlhf/")
    assert nodes_for("rayjob-train", demand(config).gangs) == {"trainers": 1}


def test_the_training_job_gives_its_nodes_back():
    assert manifest("rayjob-train")["spec"]["shutdownAfterJobFinishes"] is True


def test_the_service_deploys_what_jobs_serve_would():
    """Compares field by field, so that the manifest follows changes of `actors.serving.control`."""
    (deployed,) = serve_config().applications
    scorer, gateway = deployed.deployments
    told = scorer.user_config
    config = ServeJobConfig(
        checkpoint=told["scorer"]["checkpoint"],
        use_gpu=True,
        cpus_per_shard=4,
        min_replicas=1,
        max_replicas=8,
    )
    wanted = control.application(config, ScorerConfig(**told["scorer"]), gateway.user_config["http"]["token_sha256"])
    written = deployed.model_dump(exclude_unset=True)
    for deployment in written["deployments"]:
        if "scorer" in deployment["user_config"]:
            deployment["user_config"]["scorer"] = ScorerConfig(**deployment["user_config"]["scorer"]).model_dump(
                mode="json"
            )
    assert written == wanted


def test_the_service_names_an_application_that_exists():
    assert import_attr(serve_config().applications[0].import_path) is app


def test_the_services_pool_has_room_in_its_own_cluster():
    scorer = serve_config().applications[0].deployments[0]
    options, most = scorer.ray_actor_options, scorer.autoscaling_config["max_replicas"]
    bundle = {"CPU": options.num_cpus, "GPU": options.num_gpus}
    assert nodes_for("rayservice-scorers", singles=[bundle] * most) == {"scorers": most}
    assert most == workers("rayservice-scorers")["scorers"]["max_workers"]


def test_nothing_starts_before_a_token_is_set():
    """The service listens beyond loopback, so it requires a token."""
    host = serve_config().http_options.host
    http = serve_config().applications[0].deployments[1].user_config["http"]
    assert host == "0.0.0.0"
    for digest in ("change-me", None, "", hashlib.sha256(b"").hexdigest()):
        with pytest.raises(ConfigError, match="token_sha256"):
            HttpSettings(**{**http, "token_sha256": digest}, host=host)
    assert HttpSettings(**{**http, "token_sha256": hashlib.sha256(b"a secret").hexdigest()}, host=host)
