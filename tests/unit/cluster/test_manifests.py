"""The cluster's files against the operators' schemas, against each other, and against the code that they run."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement

import usr_ray
from tests.unit.crd_fields import FIELDS_FILE, custom_resources, documents, fields, leaves, paths, problems, read_crds
from usr_ray.config import Config, UserError
from usr_ray.launch.environment import RAY_ENVIRONMENT
from usr_ray.operations.daily import label_lag

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[3]
CLUSTER = ROOT / "cluster"
FIELDS: dict[str, Any] = json.loads(FIELDS_FILE.read_text(encoding="utf-8"))
TYPES = {"string": str, "integer": int, "boolean": bool, "number": (int, float), "integer or string": (int, str)}
SIZES = ("spark.driver.memory", "spark.executor.", "spark.dynamicAllocation.")
RESOURCES = [pytest.param(d, id=f"{d['kind']}-{d['metadata']['name']}") for d in custom_resources()]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    return dict(line.split("==") for line in lines if "==" in line)


def properties(name: str) -> dict[str, str]:
    """A Spark properties file."""
    lines = (CLUSTER / "spark" / name).read_text(encoding="utf-8").splitlines()
    pairs = [line.split(None, 1) for line in lines if line.strip() and not line.startswith("#")]
    return {key: value.strip() for key, value in pairs}


def found(value: Any, key: str) -> Iterator[Any]:
    """Every value that stands under the key, however deep."""
    for _, inner in paths(value):
        if isinstance(inner, dict) and key in inner:
            yield inner[key]


def spark_specs() -> list[dict[str, Any]]:
    specs = {d["kind"]: d["spec"] for d in custom_resources()}
    return [specs["SparkApplication"], specs["ScheduledSparkApplication"]["template"]]


def ray_specs() -> list[dict[str, Any]]:
    specs = {d["kind"]: d["spec"] for d in custom_resources()}
    return [specs["RayCluster"], specs["RayJob"]["rayClusterSpec"]]


def all_ray_specs() -> list[dict[str, Any]]:
    """With the service's, whose size is fixed."""
    return [*ray_specs(), {d["kind"]: d["spec"] for d in custom_resources()}["RayService"]["rayClusterConfig"]]


# ---- the operators' schemas


@pytest.mark.parametrize("document", RESOURCES)
def test_every_field_is_one_that_the_operators_schema_has_and_of_its_type(document: dict[str, Any]) -> None:
    known = FIELDS[document["kind"]]
    for path, value in paths(document["spec"]):
        if isinstance(value, dict | list):
            continue
        kind = known.get(path) or known.get(re.sub(r"/[^/]*$", "/*", path))
        assert kind, f"{path}: not a field of {FIELDS['source']}; run tests/unit/crd_fields.py on their schemas"
        assert isinstance(value, TYPES[kind]), f"{path}: {value!r} is no {kind}"
        assert kind != "integer" or not isinstance(value, bool)


@pytest.mark.skipif("USR_RAY_CRDS" not in os.environ, reason="USR_RAY_CRDS names no folder with the operators' schemas")
def test_every_manifest_passes_the_operators_whole_schemas() -> None:
    schemas = read_crds(Path(os.environ["USR_RAY_CRDS"]))
    for document in custom_resources():
        assert problems(document, schemas) == []
        schema = schemas[f"{document['kind']} {document['apiVersion']}"]["properties"]["spec"]
        assert leaves(fields(schema, document["spec"])).items() <= FIELDS[document["kind"]].items()


def test_a_field_of_a_misspelt_name_or_a_wrong_type_is_found() -> None:
    known = FIELDS["RayCluster"]
    assert "spec/authOptions/mode" in known
    assert "spec/authOptions/modus" not in known
    assert known["spec/headGroupSpec/rayStartParams/*"] == "string", "num-cpus: 8 without quotes would be refused"


def test_the_launchers_file_passes_rays_own_schema() -> None:
    """Ray installs the schema of `ray up` files with itself."""
    path = Path(importlib.metadata.distribution("ray").locate_file("ray/autoscaler/ray-schema.json"))
    document = yaml.safe_load((CLUSTER / "ray" / "aws.yaml").read_text(encoding="utf-8"))
    schema = json.loads(path.read_text(encoding="utf-8"))
    assert [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(document)] == []
    assert document["head_node_type"] in document["available_node_types"]
    assert (
        sum(kind.get("max_workers", 0) for kind in document["available_node_types"].values()) <= document["max_workers"]
    )


# ---- versions


def test_versions_are_those_of_constraints_and_of_this_package() -> None:
    for spec in spark_specs():
        assert spec["sparkVersion"] == pins()["pyspark"]
    for spec in all_ray_specs():
        assert spec["rayVersion"] == pins()["ray"]
    images = {image for d in custom_resources() for image in found(d["spec"], "image")}
    images.add(yaml.safe_load((CLUSTER / "ray" / "aws.yaml").read_text(encoding="utf-8"))["docker"]["image"])
    names = {f"registry.example/usr-ray-{side}:{usr_ray.__version__}" for side in ("spark", "train")}
    assert images == names


def test_images_take_their_versions_from_constraints_and_are_tagged_with_ours() -> None:
    for side, extras, tag in (("spark", "'.[etl]'", "spark"), ("ray", "'.[train,serve,redis]'", "train")):
        text = (CLUSTER / "images" / f"{side}.Dockerfile").read_text(encoding="utf-8")
        assert f"--constraint constraints.txt --editable {extras}" in text
        assert f"--tag usr-ray-{tag}:{usr_ray.__version__} " in text
        assert len(re.findall("pip install", text)) == 1, "nothing comes in unpinned"
        copied = {
            Path(word).parts[0]
            for line in re.findall(r"^COPY (?:--\S+ )?(.+) \S+$", text, re.M)
            for word in line.split()
        }
        ignore = (CLUSTER / "images" / f"{side}.Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
        assert "*" in ignore, "what is not named stays out: runs, lakes, tokens"
        assert copied <= {line.removeprefix("!") for line in ignore}
        assert all((ROOT / name).exists() for name in copied)
        assert re.search(r"^USER (185|ray)$", text, re.M), "not root"


def closure(*packages: str) -> set[str]:
    """The packages and all they need, as installed here."""
    todo, done = [Requirement(package) for package in packages], set()
    while todo:
        need = todo.pop()
        if need.name.lower() in done:
            continue
        try:
            requires = importlib.metadata.requires(need.name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform
        done.add(need.name.lower())
        for requirement in map(Requirement, requires):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in (need.extras or {""})):
                todo.append(requirement)
    return done


def extra(name: str) -> list[str]:
    text = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    block = re.search(rf"^{name} =\n((?:    .+\n)+)", text, re.M)
    assert block is not None
    return block[1].split()


def test_sparks_image_gets_no_torch_and_rays_image_no_spark() -> None:
    spark, ray = (
        closure("numpy", "pyarrow", *extra("etl")),
        closure("numpy", "pyarrow", *extra("train"), *extra("serve")),
    )
    assert "py4j" in spark, "the closure is followed"
    assert "filelock" in ray
    assert not spark & {"torch", "ray", "deltalake"}
    assert not ray & {"pyspark", "delta-spark", "py4j"}
    text = (CLUSTER / "images" / "ray.Dockerfile").read_text(encoding="utf-8")
    assert not re.search("jdk|jre|java", text.replace("no JVM", ""))


def test_rays_image_has_the_programs_that_are_called_in_it() -> None:
    """By the name of their Debian package; python:slim has none of them.

    wget: KubeRay 1.5's probes of every pod, and those of a RayService's workers in 1.7 (ray-operator/controllers/ray/
    common/pod.go). ssh, rsync, ps: `ray up`.
    """
    text = (CLUSTER / "images" / "ray.Dockerfile").read_text(encoding="utf-8")
    (packages,) = re.findall(r"apt-get install --yes --no-install-recommends (.+) \\\n", text)
    assert {"wget", "openssh-client", "rsync", "procps", "tini"} <= set(packages.split())


# ---- Spark


def test_the_daily_build_takes_every_date_whose_labels_were_open_the_day_before() -> None:
    """By hand, for 1 + 24 hours: a row of 23:59 on the 1st is final at 00:59 on the 3rd, so the run of the 4th is the
    first whose logs (to the end of the 3rd) reach beyond that, and restates the 1st once more: today-3."""
    arguments = {d["kind"]: d["spec"] for d in custom_resources()}["ScheduledSparkApplication"]["template"]["arguments"]
    dates = arguments[arguments.index("--dates") + 1]
    assert dates == "today-3:today-1"
    assert dates == f"today-{1 + label_lag(Config())}:today-1"
    assert "--restate-built" in arguments, "or the rows of dates that are there would get the catalogue of today"
    assert f"--dates {dates} --restate-built" in (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")


def test_spark_properties_say_what_every_session_of_ours_is_set_to() -> None:
    pytest.importorskip("pyspark")
    from etl.session import REQUIRED

    assert REQUIRED.items() <= properties("cluster.conf").items()


def test_the_applications_carry_the_properties_files() -> None:
    """The operator mounts a file over the image's own defaults, so the manifests must say it all again."""
    conf = {key: value for key, value in properties("cluster.conf").items() if not key.startswith(SIZES)}
    stores = {key.removeprefix("spark.hadoop."): value for key, value in properties("object_stores.conf").items()}
    for spec in spark_specs():
        assert conf.items() <= spec["sparkConf"].items()
        assert spec["hadoopConf"] == stores
        assert spec["memoryOverheadFactor"] == properties("cluster.conf")["spark.executor.memoryOverheadFactor"]
        assert not [key for key in spec["sparkConf"] if key.startswith(SIZES)], "these are fields of the application"


def test_no_properties_file_or_manifest_holds_a_key() -> None:
    secret = re.compile(r"(?i)(secret|password|access\.?key|account\.?key|token)\S*[ :=]+[A-Za-z0-9/+]{16,}")
    for path in [*CLUSTER.rglob("*.conf"), *CLUSTER.rglob("*.y*ml"), *CLUSTER.rglob("*.json")]:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if "provider" not in line]
        assert not secret.search("\n".join(lines)), path


@pytest.mark.integration
def test_the_environments_spark_submit_is_right_without_activation_or_exports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(CLUSTER / "spark"))
    import install_delta_jars

    spark, binaries = tmp_path / "a b" / "pyspark", tmp_path / "a b" / "bin"
    for path in (spark / "bin" / "spark-submit", spark / "jars" / "x.jar", binaries / "find_spark_home.py"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    finder = Path(pytest.importorskip("pyspark").__file__).with_name("find_spark_home.py")
    (binaries / "find_spark_home.py").write_bytes(finder.read_bytes())
    for _ in range(2):  # a second set-up changes nothing
        install_delta_jars.set_defaults(spark, tmp_path / "a b")
    # As PyPI's spark-submit asks: of a Python that has no pyspark.
    command = [sys.executable, "-I", "-S", str(binaries / "find_spark_home.py")]
    home = Path(subprocess.run(command, capture_output=True, text=True, check=True, cwd="/").stdout.strip())
    assert home.resolve() == spark
    conf = CLUSTER / "spark" / "conf"
    assert (home / "conf" / "log4j2.properties").read_text() == (
        CLUSTER / "spark" / "conf" / "log4j2.properties"
    ).read_text()
    lines = (home / "conf" / "spark-defaults.conf").read_text().splitlines()
    ours = (conf / "spark-defaults.conf").read_text().splitlines()
    assert lines == [*ours, f"spark.pyspark.driver.python  {binaries / 'python'}"]


@pytest.mark.integration
def test_an_archive_of_modules_gets_byte_code_once_and_keeps_its_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(CLUSTER / "spark"))
    import install_delta_jars

    archive = tmp_path / "a b.zip"
    names = ("pyspark/__init__.py", "pyspark/own.py", "pyspark/pandas/__init__.py", "pyspark/pandas/x.py")
    sources = dict.fromkeys(names, "HERE = __file__\n")
    with zipfile.ZipFile(archive, "w") as bundle:
        for name, text in sources.items():
            bundle.writestr(name, text)
    install_delta_jars.add_byte_code(archive)
    whole = archive.read_bytes()
    install_delta_jars.add_byte_code(archive)
    assert archive.read_bytes() == whole
    with zipfile.ZipFile(archive) as bundle:
        assert {name: bundle.read(name).decode() for name in sources} == sources
    say = "import pyspark.own, pyspark.pandas.x as x; print(pyspark.own.HERE, x.HERE, sep='\\n')"
    command = [sys.executable, "-S", "-c", say]
    found = subprocess.run(command, env={"PYTHONPATH": str(archive)}, capture_output=True, text=True, check=True)
    assert found.stdout.splitlines() == [f"{archive}/pyspark/own.pyc", f"{archive}/pyspark/pandas/x.py"]


def test_connectors_have_the_version_of_sparks_hadoop_and_do_not_double_its_jars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(CLUSTER / "spark"))
    import install_store_jars as jars

    pyspark = pytest.importorskip("pyspark")
    shipped = Path(pyspark.__file__).parent / "jars"
    assert re.fullmatch(r"3\.\d+\.\d+", jars.hadoop_version(shipped))
    for name in ("httpclient-4.5.14.jar", "hadoop-client-api-3.5.0.jar"):
        (tmp_path / name).touch()
    resolved = [
        Path("org.apache.hadoop_hadoop-aws-3.5.0.jar"),
        Path("org.apache.httpcomponents_httpclient-4.5.13.jar"),  # Spark has it in its own version
        Path("commons-logging_commons-logging-1.3.0.jar"),  # Spark has its classes under another name
    ]
    assert [path.name for path in jars.missing(resolved, tmp_path)] == ["org.apache.hadoop_hadoop-aws-3.5.0.jar"]
    assert jars.hadoop_version(tmp_path) == "3.5.0"


def entrypoint(*arguments: str, environment: dict[str, str], tmp_path: Path) -> list[str]:
    """What the Spark image's entry point would execute, one word a line."""
    for name in ("tini", "java", "spark-submit"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        stand_in = tmp_path / "bin" / name
        stand_in.write_text('#!/bin/bash\nprintf "%s\\n" "${0##*/}" "$@"\n', encoding="utf-8")
        stand_in.chmod(0o755)
    script = str(CLUSTER / "images" / "spark-entrypoint.sh")
    environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "SPARK_HOME": "/opt/spark"} | environment
    done = subprocess.run(
        ["/bin/bash", script, *arguments], env=environment, cwd="/", capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


@pytest.mark.integration
def test_the_images_entry_point_starts_drivers_executors_and_anything_else(tmp_path: Path) -> None:
    address = {"SPARK_DRIVER_BIND_ADDRESS": "10.0.0.9"}
    driver = entrypoint("driver", "--class", "X", "local:///a b.py", environment=address, tmp_path=tmp_path)
    assert driver[:3] == ["tini", "-s", "--"]
    assert driver[3] == "/opt/spark/bin/spark-submit"
    assert "spark.driver.bindAddress=10.0.0.9" in driver
    assert driver[-3:] == ["--class", "X", "local:///a b.py"], "a blank inside an argument stays there"
    names = (
        "EXECUTOR_MEMORY",
        "DRIVER_URL",
        "EXECUTOR_ID",
        "EXECUTOR_CORES",
        "APPLICATION_ID",
        "EXECUTOR_POD_IP",
        "RESOURCE_PROFILE_ID",
        "EXECUTOR_POD_NAME",
    )
    environment = {f"SPARK_{name}": name.lower() for name in names}
    # Ten options: in the order of their numbers, not of their names.
    environment |= {f"SPARK_JAVA_OPT_{n}": f"-Dn={n}" for n in range(11)}
    executor = entrypoint("executor", environment=environment, tmp_path=tmp_path)
    assert executor[4:15] == [f"-Dn={n}" for n in range(11)]
    assert executor[15:17] == ["-Xmsexecutor_memory", "-Xmxexecutor_memory"]
    assert executor[executor.index("--driver-url") + 1] == "driver_url"
    assert entrypoint("java", "-version", environment={}, tmp_path=tmp_path) == ["java", "-version"]


# ---- Ray


def test_rays_pods_and_image_have_the_environment_that_training_needs() -> None:
    text = (CLUSTER / "images" / "ray.Dockerfile").read_text(encoding="utf-8")
    in_image = dict(re.findall(r"([A-Z_]+)=(\S+)", text.split("ENV ", 1)[1].split("\nUSER")[0]))
    assert RAY_ENVIRONMENT.items() <= in_image.items()
    for spec in all_ray_specs():
        for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
            (container,) = group["template"]["spec"]["containers"]
            assert {e["name"]: e["value"] for e in container["env"]} == RAY_ENVIRONMENT


def test_ray_is_never_without_a_token() -> None:
    for spec in all_ray_specs():
        assert spec["authOptions"] == {"mode": "token"}
    launcher = (CLUSTER / "ray" / "aws.yaml").read_text(encoding="utf-8")
    starts = re.findall(r"^.*ray start .*$", launcher, re.M)
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in line for line in starts)
    assert "dashboard-host=127.0.0.1" in launcher
    assert "RAY_AUTH_MODE=token" in (CLUSTER / "images" / "ray.Dockerfile").read_text(encoding="utf-8")


def test_cpu_and_gpu_groups_grow_from_nothing_and_hold_what_a_worker_asks_for() -> None:
    job = {d["kind"]: d["spec"] for d in custom_resources()}["RayJob"]
    wanted = dict(re.findall(r"ray\.(\w+)=(\S+)", job["entrypoint"]))
    for spec in ray_specs():
        assert spec["enableInTreeAutoscaling"] is True
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
        assert set(groups) == {"cpu", "gpu"}
        for name, group in groups.items():
            resources = group["template"]["spec"]["containers"][0]["resources"]
            assert group["minReplicas"] == 0
            assert resources["limits"] == resources["requests"]
            assert group["rayStartParams"]["num-cpus"] == resources["limits"]["cpu"]
            assert group["rayStartParams"].get("num-gpus") == resources["limits"].get("nvidia.com/gpu")
            assert ("num-gpus" in group["rayStartParams"]) == (name == "gpu")
        room = groups["gpu" if wanted["use_gpu"] == "true" else "cpu"]
        assert float(wanted["cpus_per_worker"]) <= float(room["rayStartParams"]["num-cpus"])
        assert int(wanted["num_workers"]) <= room["maxReplicas"]


def test_the_service_is_the_file_that_serve_deploy_takes_and_fits_its_workers(tmp_path: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    from usr_ray.serving import app

    spec = {d["kind"]: d["spec"] for d in custom_resources()}["RayService"]
    text = (CLUSTER / "serve" / "usr_ray.yaml").read_text(encoding="utf-8")
    assert spec["serveConfigV2"] == text
    (found_app,) = ServeDeploySchema.parse_obj(yaml.safe_load(text)).applications
    (group,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    (replica,) = found_app.deployments
    assert replica.num_replicas == group["replicas"] == group["minReplicas"] == group["maxReplicas"]
    assert group["rayStartParams"]["num-cpus"] == str(found_app.args["num_workers"])
    assert found_app.import_path == f"{app.__name__}:{app.application.__name__}"
    for container in found(spec, "containers"):
        places = [mount["mountPath"] for mount in container[0]["volumeMounts"]]
        assert all(any(found_app.args[name].startswith(p) for p in places) for name in ("registry", "token_file"))
    token = tmp_path / "token"
    token.write_text("\n")
    with pytest.raises(UserError, match="holds no token"):
        app.application(found_app.args | {"token_file": str(token)})
    token.write_text("secret\n")
    bound = app.application(found_app.args | {"token_file": str(token)})
    assert bound._bound_deployment.name == replica.name


# ---- names, ports and rights, across the files


def test_every_name_that_one_manifest_refers_to_is_in_another() -> None:
    named = {(d["kind"], d["metadata"]["name"]) for _, d in documents()}
    for file, document in documents():
        if document["kind"] != "Namespace":
            assert document["metadata"]["namespace"] == "usr-ray", file
    for document in custom_resources():
        accounts = {*found(document["spec"], "serviceAccount"), *found(document["spec"], "serviceAccountName")}
        assert accounts
        assert {("ServiceAccount", name) for name in accounts} <= named
        claims = {claim["claimName"] for claim in found(document["spec"], "persistentVolumeClaim")}
        assert {("PersistentVolumeClaim", name) for name in claims} <= named
        maps = {volume["name"] for volume in found(document["spec"], "configMap")}
        assert maps <= {"usr-ray-config"}, "made by the command at the head of the file"


def test_what_is_replaced_by_force_is_a_job_and_nothing_that_keeps_data() -> None:
    """`kubectl replace --force` deletes everything that the file names, a volume claim too."""
    kinds: dict[str, list[str]] = {}
    for file, document in documents():
        kinds.setdefault(file, []).append(document["kind"])
    pages = [*(CLUSTER / "kubernetes").glob("*.yaml"), ROOT / "docs" / "cluster.md"]
    text = "".join(path.read_text(encoding="utf-8") for path in pages)
    forced = set(re.findall(r"kubectl replace --force -f cluster/kubernetes/(\S+)", text))
    assert {file: kinds[file] for file in forced} == {
        "build-samples.yaml": ["SparkApplication"],
        "rayjob.yaml": ["RayJob"],
    }


def test_no_pod_runs_as_root_or_keeps_a_right_it_does_not_need() -> None:
    pods = [role for spec in spark_specs() for role in (spec["driver"], spec["executor"])]
    for role in pods:
        context = role["securityContext"]
        assert (context["runAsNonRoot"], context["runAsUser"]) == (True, 185)
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    templates = [t for d in custom_resources() if d["kind"].startswith("Ray") for t in found(d["spec"], "template")]
    templates += list(found({d["kind"]: d["spec"] for d in custom_resources()}["RayJob"], "submitterPodTemplate"))
    assert len(templates) == 9, "two clusters of a head and two groups, a head and a group that serve, and a submitter"
    for template in templates:
        context = template["spec"]["securityContext"]
        assert (context["runAsNonRoot"], context["runAsUser"]) == (True, 1000)
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        pods += template["spec"]["containers"]
    pods += [spec["autoscalerOptions"] for spec in ray_specs()]
    for pod in pods:
        assert pod["securityContext"]["allowPrivilegeEscalation"] is False
        assert pod["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_policies_let_in_nobody_but_ourselves_the_operator_and_prometheus() -> None:
    policies = {d["metadata"]["name"]: d["spec"] for _, d in documents() if d["kind"] == "NetworkPolicy"}
    assert policies["deny-ingress"] == {"podSelector": {}, "policyTypes": ["Ingress"]}
    ports = {
        name: [p["port"] for rule in spec["ingress"] for p in rule.get("ports", ())]
        for name, spec in policies.items()
        if "ingress" in spec
    }
    assert ports == {"among-ourselves": [], "operator-to-head": [8265], "prometheus-to-metrics": [8080, 4040, 8000]}
    labels = [{"app.kubernetes.io/part-of": "usr-ray"}]
    for document in custom_resources():
        for found_labels in found(document["spec"], "labels"):
            assert labels[0].items() <= found_labels.items(), "else the policies would not know the pod"
    for spec in all_ray_specs():
        (head,) = spec["headGroupSpec"]["template"]["spec"]["containers"]
        listening = {port["name"]: port["containerPort"] for port in head["ports"]}
        assert (listening["dashboard"], listening["metrics"]) == (8265, 8080)
        for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
            assert group["rayStartParams"]["metrics-export-port"] == "8080"
