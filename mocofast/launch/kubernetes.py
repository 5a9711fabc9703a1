"""A PyTorchJob of Kubeflow's training operator, for Kubernetes."""

from __future__ import annotations

from typing import Any

from mocofast.config import ConfigError
from mocofast.launch.request import HEADER, Request
from mocofast.launch.torchrun import torchrun

# torchrun restarts the ranks of a pod that lives. The operator replaces a pod that has died.
RESTARTS_IN_A_POD = 3


def manifest(request: Request) -> str:
    """Returns a manifest (kubeflow.org/v1) for kubectl.

    A pod is a machine. The operator names the first pod in MASTER_ADDR and MASTER_PORT, and numbers
    the pods in RANK. A deleted
    pod gets SIGTERM, has `deadline` seconds for a checkpoint, and a new pod continues.

    Raises ConfigError without an image, or for a volume that is not CLAIM:FOLDER.
    """
    from mocofast.launch.document import dump  # here, so that `--help` loads no YAML

    options = request.options
    if not options.image:
        raise ConfigError("--image: k8s needs a container image that has mocofast")
    # Quantities are strings, as Kubernetes returns them and as its clients ask for.
    limits = {"cpu": str(options.cpus * options.processes)}
    if options.gpus:
        limits["nvidia.com/gpu"] = str(options.gpus)
    if options.memory:
        limits["memory"] = options.memory
    start = torchrun(request, "$MASTER_ADDR:$MASTER_PORT", "RANK", RESTARTS_IN_A_POD)
    container: dict[str, Any] = {
        "name": "pytorch",  # the operator sets the environment of the container of this name
        "image": options.image,
        # Kubernetes makes $ of $$. The other uses of $ here stay as they are.
        "command": ["bash", "-c", f"{request.setup}exec {start}\n".replace("$$", "$$$$")],
        "resources": {"limits": limits},
        # Workers of loaders share batches in /dev/shm, which has 64 MB by default.
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }
    volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
    if options.volume:
        claim, _, folder = options.volume.partition(":")
        if not claim or not folder.startswith("/"):
            raise ConfigError(
                f"--volume: expected CLAIM:FOLDER, such as data:/data, got {options.volume!r}"
            )
        volumes.append({"name": "data", "persistentVolumeClaim": {"claimName": claim}})
        container["volumeMounts"].append({"name": "data", "mountPath": folder})
        container["workingDir"] = folder
    pod = {
        "terminationGracePeriodSeconds": options.deadline,
        "containers": [container],
        "volumes": volumes,
    }
    replica = {"restartPolicy": "OnFailure", "template": {"spec": pod}}
    replicas = {"Master": {"replicas": 1, **replica}}
    if options.nodes > 1:
        replicas["Worker"] = {"replicas": options.nodes - 1, **replica}
    content = {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": options.name},
        "spec": {
            "nprocPerNode": str(options.processes),
            "runPolicy": {"backoffLimit": options.restarts, "cleanPodPolicy": "None"},
            "pytorchReplicaSpecs": replicas,
        },
    }
    return f"# {HEADER} k8s\n{dump(content)}"
