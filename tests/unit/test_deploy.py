"""What a cluster is started and scheduled with: checked by Ray's own schema and provider, and by running."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from for_ray.config import IndexSettings, read_settings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
RAYJOB = DEPLOY / "nightly-rayjob.yaml"

RAYJOB_FIELDS = {
    *("entrypoint", "submissionMode", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "backoffLimit"),
    *("activeDeadlineSeconds", "rayClusterSpec"),
}
CLUSTER_FIELDS = {
    *("rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec"),
    "workerGroupSpecs",
}
WORKER_FIELDS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    """cluster.yaml with Ray's defaults, after Ray's own check."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    validate_config(prepared)
    return prepared


@pytest.fixture(scope="module")
def manifests() -> dict[str, Any]:
    """The objects of the nightly manifest by their kind; service accounts in a list."""
    documents = list(yaml.safe_load_all(RAYJOB.read_text()))
    accounts = [each for each in documents if each["kind"] == "ServiceAccount"]
    return {"accounts": accounts, **{each["kind"]: each for each in documents}}


@pytest.fixture(scope="module")
def rayjob(manifests: dict[str, Any]) -> dict[str, Any]:
    return yaml.safe_load(manifests["ConfigMap"]["data"]["rayjob.yaml"])


def settings_of(command: str) -> IndexSettings:
    """The settings that a command line with `jobs/index.py` gives the job: all known, and in range."""
    arguments = command.split("jobs/index.py", 1)[1].split(">", 1)[0].split()
    return read_settings(IndexSettings, arguments)


def test_rays_schema_takes_cluster_yaml_and_its_counts_fit(cluster):
    types = cluster["available_node_types"]
    assert cluster["head_node_type"] == "head"
    assert types["head"]["resources"] == {"CPU": 0}  # no task beside the driver
    assert types["head"]["max_workers"] == 0
    for name in ("cpu", "gpu-spot"):
        assert types[name]["min_workers"] == 0 < types[name]["max_workers"]
        assert types[name]["max_workers"] <= cluster["max_workers"]
    assert types["gpu-spot"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert all("InstanceMarketOptions" not in types[name]["node_config"] for name in ("head", "cpu"))
    assert {each["node_config"]["IamInstanceProfile"]["Name"] for each in types.values()} == {"for-ray-node"}
    assert 0 < cluster["idle_timeout_minutes"] <= 15
    assert cluster["provider"]["cache_stopped_nodes"] is False


def test_every_node_of_cluster_yaml_has_the_package_and_the_token(cluster):
    mounts = cluster["file_mounts"]
    assert mounts["/home/ray/for_ray"] == "."
    assert mounts["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    assert {".venv/", ".git/"} <= set(cluster["rsync_exclude"])
    (install,) = cluster["setup_commands"]
    assert install == "cd /home/ray/for_ray && pip install --quiet -c constraints.txt '.[gpu]'"
    for command in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [each for each in cluster[command] if "ray start" in each]
        assert len(starts) == 1
        assert "RAY_AUTH_MODE=token ray start" in starts[0]
    assert "--env RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]


def test_rays_version_is_the_same_everywhere(cluster, rayjob):
    (pinned,) = re.findall(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    image = f"rayproject/ray:{pinned}-py311-gpu"
    assert cluster["docker"]["image"] == image
    assert f"FROM {image}\n" in (DEPLOY / "Dockerfile").read_text()
    assert rayjob["spec"]["rayClusterSpec"]["rayVersion"] == pinned


def test_what_the_image_copies_is_there_and_is_enough():
    copied = [
        name
        for line in re.findall(r"^COPY --chown=\S+ (.+)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
        for name in line.split()[:-1]
    ]
    assert all((ROOT / name).exists() for name in copied)
    assert {"for_ray", "jobs", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"} == set(copied)


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """An AWS within this process, whose account has the role that cluster.yaml names."""
    from moto import mock_aws

    monkeypatch.setenv("HOME", str(tmp_path))  # Ray makes a key pair in ~/.ssh
    monkeypatch.setenv("MOTO_IAM_LOAD_MANAGED_POLICIES", "true")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    for name in [name for name in os.environ if name.startswith("AWS_ENDPOINT_URL")]:
        monkeypatch.delenv(name)
    with mock_aws():
        import boto3

        iam = boto3.client("iam")
        iam.create_role(RoleName="for-ray-node", AssumeRolePolicyDocument="{}")
        iam.put_role_policy(
            RoleName="for-ray-node",
            PolicyName="for-ray",
            PolicyDocument=(DEPLOY / "iam-policy.json").read_text(),
        )
        iam.create_instance_profile(InstanceProfileName="for-ray-node")
        iam.add_role_to_instance_profile(InstanceProfileName="for-ray-node", RoleName="for-ray-node")
        yield boto3.client("ec2")


@pytest.mark.slow
def test_rays_aws_provider_starts_a_spot_node_with_the_role(cluster, aws):
    from ray.autoscaler._private.providers import _get_node_provider_cls

    provider_class = _get_node_provider_cls(cluster["provider"])
    filled = provider_class.bootstrap_config(provider_class.fillout_available_node_types_resources(cluster))
    types = filled["available_node_types"]
    assert types["head"]["resources"]["CPU"] == 0
    assert types["cpu"]["resources"]["CPU"] == 16
    assert types["gpu-spot"]["resources"]["GPU"] == 1
    provider = provider_class(filled["provider"], filled["cluster_name"])
    gpu = types["gpu-spot"]
    tags = {"ray-node-type": "worker", "ray-user-node-type": "gpu-spot"}
    provider.create_node_with_resources_and_labels(gpu["node_config"], tags, 1, gpu["resources"], {})
    (instance,) = aws.describe_instances()["Reservations"][0]["Instances"]
    assert instance["InstanceType"] == gpu["node_config"]["InstanceType"]
    assert instance["InstanceLifecycle"] == "spot"
    assert instance["IamInstanceProfile"]["Arn"].endswith("instance-profile/for-ray-node")
    assert {"Key": "ray-cluster-name", "Value": "for-ray"} in instance["Tags"]  # the policy's condition


def test_the_policy_reads_images_and_keeps_the_index():
    statements = json.loads((DEPLOY / "iam-policy.json").read_text())["Statement"]
    by_id = {each["Sid"]: each for each in statements}
    assert set(by_id["ReadImages"]["Action"]) == {"s3:GetObject"}
    assert set(by_id["KeepTheIndex"]["Action"]) == {
        *("s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload")
    }
    assert "s3:ListBucket" in by_id["ListBoth"]["Action"]
    assert by_id["ListBoth"]["Resource"] == ["arn:aws:s3:::IMAGES-BUCKET", "arn:aws:s3:::INDEX-BUCKET"]
    assert all("*" not in each["Action"] and "s3:*" not in each["Action"] for each in statements)


def test_the_policy_reads_encrypted_buckets_and_starts_the_first_spot_node(cluster):
    """Keys through S3 only, and the one role that EC2 makes itself where an account never had a spot node."""
    statements = json.loads((DEPLOY / "iam-policy.json").read_text())["Statement"]
    by_action = {action: each for each in statements for action in each["Action"]}
    keys = by_action["kms:Decrypt"]
    assert set(keys["Action"]) == {"kms:Decrypt", "kms:GenerateDataKey"}
    assert keys["Condition"] == {"StringLike": {"kms:ViaService": "s3.*.amazonaws.com"}}
    spot = by_action["iam:CreateServiceLinkedRole"]
    assert [arn.rpartition("/")[2] for arn in spot["Resource"]] == ["AWSServiceRoleForEC2Spot"]
    assert spot["Condition"] == {"StringEquals": {"iam:AWSServiceName": "spot.amazonaws.com"}}
    market = cluster["available_node_types"]["gpu-spot"]["node_config"]["InstanceMarketOptions"]
    assert market["MarketType"] == "spot"


def test_the_cronjob_is_what_kubernetes_wants(manifests):
    cron = manifests["CronJob"]
    assert (cron["apiVersion"], manifests["Role"]["apiVersion"]) == (
        "batch/v1",
        "rbac.authorization.k8s.io/v1",
    )
    assert cron["spec"]["concurrencyPolicy"] == "Forbid"
    assert len(cron["spec"]["schedule"].split()) == 5
    assert len(cron["metadata"]["name"]) <= 35  # KubeRay's names have 47 characters, a Job's suffix 12
    pod = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert pod["volumes"][0]["configMap"]["name"] == manifests["ConfigMap"]["metadata"]["name"]
    accounts = {each["metadata"]["name"] for each in manifests["accounts"]}
    assert pod["serviceAccountName"] in accounts
    assert manifests["RoleBinding"]["roleRef"]["name"] == manifests["Role"]["metadata"]["name"]
    assert [each["name"] for each in manifests["RoleBinding"]["subjects"]] == [pod["serviceAccountName"]]
    assert manifests["Role"]["rules"] == [
        {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]}
    ]


def test_the_rayjob_is_what_kuberay_wants(manifests, rayjob):
    assert (rayjob["apiVersion"], rayjob["kind"]) == ("ray.io/v1", "RayJob")
    spec = rayjob["spec"]
    assert set(spec) == RAYJOB_FIELDS
    assert spec["shutdownAfterJobFinishes"] is True
    assert 0 < spec["ttlSecondsAfterFinished"] < 3600
    assert 0 < spec["activeDeadlineSeconds"] < 24 * 3600
    ray = spec["rayClusterSpec"]
    assert set(ray) == CLUSTER_FIELDS
    assert ray["authOptions"] == {"mode": "token"}
    assert ray["enableInTreeAutoscaling"] is True
    assert set(ray["autoscalerOptions"]) == {"version", "idleTimeoutSeconds", "upscalingMode"}
    head, workers = ray["headGroupSpec"], {each["groupName"]: each for each in ray["workerGroupSpecs"]}
    assert head["rayStartParams"] == {"num-cpus": "0"}
    assert set(workers) == {"cpu", "gpu-spot"}
    accounts = {each["metadata"]["name"] for each in manifests["accounts"]}
    images = set()
    for group in (head, *workers.values()):
        pod = group["template"]["spec"]
        assert pod["serviceAccountName"] in accounts
        (container,) = pod["containers"]
        images.add(container["image"])
        assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
    assert len(images) == 1
    for group in workers.values():
        assert set(group) == WORKER_FIELDS
        assert group["replicas"] == group["minReplicas"] == 0 < group["maxReplicas"]
    gpus = {
        name: each["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", "0")
        for name, each in workers.items()
    }
    assert gpus == {"cpu": "0", "gpu-spot": "1"}
    settings = settings_of(spec["entrypoint"])
    assert (settings.device, settings.max_actors) == ("cuda", workers["gpu-spot"]["maxReplicas"])


@pytest.fixture
def stub(tmp_path: Path) -> Any:
    """Puts a shell script of this name first on the PATH; gives the environment."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def write(**scripts: str) -> dict[str, str]:
        for name, script in scripts.items():
            (folder / name).write_text(f"#!/bin/sh\n{script}\n")
            (folder / name).chmod(0o755)
        return {**os.environ, "PATH": f"{folder}:/usr/bin:/bin", "HERE": str(tmp_path)}

    return write


@pytest.mark.parametrize(
    ("states", "code", "said"),
    [
        (["Initializing/", "Running/RUNNING", "Complete/SUCCEEDED"], 0, ""),
        (["Running/RUNNING", "Retrying/FAILED", "Failed/FAILED"], 1, "the run ended: Failed/FAILED"),
        (["Complete/STOPPED"], 1, "the run ended: Complete/STOPPED"),
        (["Running/RUNNING", ""], 1, "the run was deleted"),
        (["fail", "Complete/SUCCEEDED"], 0, ""),  # the API server is away for a moment
    ],
)
def test_the_cronjob_submits_and_waits_for_the_end(manifests, rayjob, stub, tmp_path, states, code, said):
    (container,) = manifests["CronJob"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    (tmp_path / "rayjob.yaml").write_text(manifests["ConfigMap"]["data"]["rayjob.yaml"])
    (tmp_path / "states").write_text("\n".join(states) + "\n")
    environment = stub(
        kubectl='if [ "$1" = create ]; then cat > "$HERE/created"; exit; fi\n'
        'state=$(head -n 1 "$HERE/states"); sed -i 1d "$HERE/states"\n'
        '[ "$state" = fail ] && exit 1; printf %s "$state"',
        sleep="",
    )
    environment |= {"JOB_NAME": "for-ray-nightly-29400000", "JOB_UID": "6f0e"}
    script = container["args"][0].replace("/nightly/", f"{tmp_path}/")
    command = [*container["command"], script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout.strip()) == (code, said)
    created = yaml.safe_load((tmp_path / "created").read_text())
    assert created["metadata"]["name"] == "for-ray-nightly-29400000"
    (owner,) = created["metadata"]["ownerReferences"]
    name = "for-ray-nightly-29400000"
    assert owner == {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": "6f0e"}
    assert created["spec"] == rayjob["spec"]


@pytest.mark.parametrize("code", [0, 1])
def test_the_cron_line_submits_under_the_date_and_mails_only_failures(stub, tmp_path, code):
    lines = (DEPLOY / "nightly.cron").read_text().splitlines()
    (line,) = [line for line in lines if "ray job submit" in line]
    minute, hour, *days, command = line.split(maxsplit=5)
    assert (minute, hour, days) == ("30", "1", ["*", "*", "*"])
    assert re.findall(r"(?<!\\)%", command) == []  # cron ends a command there
    command = command.replace(r"\%", "%").replace("/home/ray/for_ray", str(tmp_path))
    environment = stub(ray=f'echo "$@" > "$HERE/given"; echo "what the job says"; exit {code}')
    log_path = tmp_path / "nightly.log"
    command = command.replace("/tmp/nightly.log", str(log_path))
    done = subprocess.run(["/bin/sh", "-c", command], env=environment, capture_output=True, text=True)
    today = subprocess.run(["date", "+%F"], capture_output=True, text=True).stdout.strip()
    given = (tmp_path / "given").read_text()
    submitted = f"job submit --submission-id nightly-{today} --working-dir . -- python jobs/index.py"
    assert given.startswith(submitted)
    assert settings_of(command).device == "cuda"
    assert done.stdout == ("what the job says\n" if code else "")
    assert log_path.read_text() == "what the job says\n"


def test_prometheus_reads_the_list_that_ray_writes():
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    (job,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    assert job["file_sd_configs"] == [{"files": [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]}]
