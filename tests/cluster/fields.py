"""JSON schemas of cloud and KubeRay fields: the part of their APIs that cluster/ uses or may use.

Ray does not check a ``node_config``, so a misspelt field would fail only on the cloud. Unlisted fields count as
mistakes; add a field here when it is needed and correct. Sources: the parameters of EC2's RunInstances
(boto3's ``create_instances``), the Instance resource of Compute Engine v1, KubeRay's ``ray.io/v1`` definitions as of
1.5.1, and the Kubernetes core API.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

ANY: Schema = {}
TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer"}
NATURAL: Schema = {"type": "integer", "minimum": 0}
FLAG: Schema = {"type": "boolean"}
QUANTITY: Schema = {"type": ["string", "integer"], "pattern": r"^\d+(\.\d+)?(m|[KMGTPE]i?)?$"}


def record(*required: str, **fields: Schema) -> Schema:
    """Returns the schema of an object with exactly these fields."""
    return {"type": "object", "properties": fields, "required": [*required], "additionalProperties": False}


def one_of(*values: str) -> Schema:
    return {"enum": [*values]}


def list_of(item: Schema) -> Schema:
    return {"type": "array", "items": item}


def map_of(value: Schema) -> Schema:
    return {"type": "object", "additionalProperties": value}


AWS_NODE = record(
    "ImageId",
    "InstanceType",
    "SecurityGroupIds",
    ImageId={"type": "string", "pattern": "^ami-[0-9a-f]{17}$"},
    InstanceType=TEXT,
    SecurityGroupIds=list_of({"type": "string", "pattern": "^sg-[0-9a-f]{17}$"}),
    SubnetIds=list_of(TEXT),  # a field of Ray, which makes a SubnetId of one of them
    KeyName=TEXT,
    EbsOptimized=FLAG,
    UserData=TEXT,
    BlockDeviceMappings=list_of(
        record(
            "DeviceName",
            DeviceName=TEXT,
            VirtualName=TEXT,
            Ebs=record(
                VolumeSize=WHOLE,
                VolumeType=one_of("gp2", "gp3", "io1", "io2"),
                Encrypted=FLAG,
                Iops=WHOLE,
                Throughput=WHOLE,
                DeleteOnTermination=FLAG,
                SnapshotId=TEXT,
                KmsKeyId=TEXT,
            ),
        )
    ),
    IamInstanceProfile=record(Arn=TEXT, Name=TEXT),
    InstanceMarketOptions=record(
        "MarketType",
        MarketType=one_of("spot", "capacity-block"),
        SpotOptions=record(MaxPrice=TEXT, SpotInstanceType=TEXT, InstanceInterruptionBehavior=TEXT),
    ),
    MetadataOptions=record(HttpTokens=one_of("optional", "required"), HttpPutResponseHopLimit=WHOLE, HttpEndpoint=TEXT),
    Placement=record(AvailabilityZone=TEXT, GroupName=TEXT, Tenancy=TEXT),
    CapacityReservationSpecification=ANY,
    NetworkInterfaces=ANY,
    TagSpecifications=list_of(record("ResourceType", ResourceType=TEXT, Tags=list_of(record(Key=TEXT, Value=TEXT)))),
)

GCP_NODE = record(
    "machineType",
    "disks",
    machineType=TEXT,
    minCpuPlatform=TEXT,
    labels=map_of(TEXT),
    tags=record(items=list_of(TEXT)),
    disks=list_of(
        record(
            boot=FLAG,
            autoDelete=FLAG,
            type=one_of("PERSISTENT", "SCRATCH"),
            interface=TEXT,
            initializeParams=record(diskSizeGb=WHOLE, diskType=TEXT, sourceImage=TEXT),
        )
    ),
    metadata=record("items", items=list_of(record("key", "value", key=TEXT, value=TEXT))),
    scheduling=record(
        provisioningModel=one_of("SPOT", "STANDARD"),
        instanceTerminationAction=one_of("DELETE", "STOP"),
        onHostMaintenance=one_of("TERMINATE", "MIGRATE"),
        automaticRestart=FLAG,
        preemptible=FLAG,
    ),
    guestAccelerators=list_of(record(acceleratorType=TEXT, acceleratorCount=WHOLE)),
    networkInterfaces=ANY,
    reservationAffinity=ANY,
    serviceAccounts=list_of(record("email", "scopes", email=TEXT, scopes=list_of(TEXT))),
)

_SECURITY = record(
    allowPrivilegeEscalation=FLAG,
    capabilities=record(add=list_of(TEXT), drop=list_of(TEXT)),
    privileged=FLAG,
    readOnlyRootFilesystem=FLAG,
    runAsNonRoot=FLAG,
    runAsUser=WHOLE,
    runAsGroup=WHOLE,
    seccompProfile=record("type", type=TEXT),
)
_QUANTITIES = {
    "type": "object",
    "properties": dict.fromkeys(("cpu", "memory", "ephemeral-storage", "nvidia.com/gpu"), QUANTITY),
    "additionalProperties": False,
}
_RESOURCES = record(requests=_QUANTITIES, limits=_QUANTITIES)
_VARIABLE = record(
    "name", name=TEXT, value=TEXT, valueFrom=record(secretKeyRef=record("key", "name", key=TEXT, name=TEXT))
)
_MOUNTS = list_of(
    record("name", "mountPath", name=TEXT, mountPath={"type": "string", "pattern": "^/"}, subPath=TEXT, readOnly=FLAG)
)
_CONTAINER = record(
    "name",
    "image",
    name=TEXT,
    image=TEXT,
    imagePullPolicy=one_of("Always", "IfNotPresent", "Never"),
    env=list_of(_VARIABLE),
    ports=list_of(record("containerPort", name={"type": "string", "maxLength": 15}, containerPort=WHOLE)),
    resources=_RESOURCES,
    securityContext=_SECURITY,
    volumeMounts=_MOUNTS,
)
_POD = record(
    "spec",
    metadata=record(labels=map_of(TEXT), annotations=map_of(TEXT)),
    spec=record(
        "containers",
        automountServiceAccountToken=FLAG,
        containers=list_of(_CONTAINER),
        imagePullSecrets=list_of(record("name", name=TEXT)),
        nodeSelector=map_of(TEXT),
        securityContext=record(
            runAsNonRoot=FLAG,
            runAsUser=WHOLE,
            runAsGroup=WHOLE,
            fsGroup=WHOLE,
            seccompProfile=record("type", type=TEXT),
        ),
        serviceAccountName=TEXT,
        tolerations=list_of(
            record(
                key=TEXT,
                operator=one_of("Exists", "Equal"),
                value=TEXT,
                effect=one_of("NoSchedule", "PreferNoSchedule", "NoExecute"),
            )
        ),
        volumes=list_of(
            record(
                "name",
                name=TEXT,
                emptyDir=record(medium=TEXT, sizeLimit=QUANTITY),
                persistentVolumeClaim=record("claimName", claimName=TEXT, readOnly=FLAG),
                projected=record(
                    "sources",
                    sources=list_of(
                        record(
                            serviceAccountToken=record("path", path=TEXT, expirationSeconds=NATURAL, audience=TEXT),
                            configMap=record(
                                "name", name=TEXT, items=list_of(record("key", "path", key=TEXT, path=TEXT))
                            ),
                            downwardAPI=record(
                                items=list_of(record("path", path=TEXT, fieldRef=record("fieldPath", fieldPath=TEXT)))
                            ),
                        )
                    ),
                ),
            )
        ),
    ),
)
_CLUSTER = record(
    "headGroupSpec",
    authOptions=record(mode=one_of("disabled", "token")),
    autoscalerOptions=record(
        env=list_of(_VARIABLE),
        idleTimeoutSeconds=NATURAL,
        image=TEXT,
        imagePullPolicy=TEXT,
        resources=_RESOURCES,
        securityContext=_SECURITY,
        volumeMounts=_MOUNTS,
        upscalingMode=one_of("Default", "Aggressive", "Conservative"),
        version=one_of("v1", "v2"),
    ),
    enableInTreeAutoscaling=FLAG,
    headGroupSpec=record(
        "template",
        enableIngress=FLAG,
        rayStartParams=map_of(TEXT),
        serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer", "ExternalName"),
        template=_POD,
    ),
    rayVersion=TEXT,
    suspend=FLAG,
    workerGroupSpecs=list_of(
        record(
            "groupName",
            "minReplicas",
            "maxReplicas",
            "template",
            groupName=TEXT,
            idleTimeoutSeconds=NATURAL,
            minReplicas=NATURAL,
            maxReplicas=NATURAL,
            replicas=NATURAL,
            numOfHosts=NATURAL,
            rayStartParams=map_of(TEXT),
            template=_POD,
        )
    ),
)


def _manifest(version: str, kind: str, spec: Schema) -> Schema:
    return record(
        *("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": version},
        kind={"const": kind},
        metadata=record(
            "name", name={"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"}, labels=map_of(TEXT)
        ),
        spec=spec,
    )


_SELECTOR = record(
    matchLabels=map_of(TEXT),
    matchExpressions=list_of(
        record(
            *("key", "operator"),
            key=TEXT,
            operator=one_of("In", "NotIn", "Exists", "DoesNotExist"),
            values=list_of(TEXT),
        )
    ),
)

MANIFESTS = {
    "NetworkPolicy": _manifest(
        "networking.k8s.io/v1",
        "NetworkPolicy",
        record(
            *("podSelector", "policyTypes"),
            podSelector=_SELECTOR,
            policyTypes=list_of(one_of("Ingress", "Egress")),
            ingress=list_of(
                record(
                    "from",
                    **{"from": list_of(record(podSelector=_SELECTOR, namespaceSelector=_SELECTOR))},
                    ports=list_of(record("port", port=NATURAL, protocol=one_of("TCP", "UDP"))),
                )
            ),
        ),
    ),
    "RayCluster": _manifest("ray.io/v1", "RayCluster", _CLUSTER),
    "RayJob": _manifest(
        "ray.io/v1",
        "RayJob",
        record(
            *("entrypoint", "rayClusterSpec"),
            activeDeadlineSeconds=NATURAL,
            backoffLimit=NATURAL,
            entrypoint=TEXT,
            entrypointNumCpus={"type": "number"},
            entrypointNumGpus={"type": "number"},
            rayClusterSpec=_CLUSTER,
            runtimeEnvYAML=TEXT,
            shutdownAfterJobFinishes=FLAG,
            submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
            suspend=FLAG,
            ttlSecondsAfterFinished=NATURAL,
        ),
    ),
    "RayService": _manifest(
        "ray.io/v1",
        "RayService",
        record(
            *("serveConfigV2", "rayClusterConfig"),
            excludeHeadPodFromServeSvc=FLAG,
            rayClusterConfig=_CLUSTER,
            serveConfigV2=TEXT,
            upgradeStrategy=record(type=one_of("NewCluster", "None")),
        ),
    ),
    "PersistentVolumeClaim": _manifest(
        "v1",
        "PersistentVolumeClaim",
        record(
            *("accessModes", "resources"),
            accessModes=list_of(one_of("ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod")),
            resources=record(requests=record("storage", storage=QUANTITY)),
            storageClassName=TEXT,
            volumeName=TEXT,
        ),
    ),
}
