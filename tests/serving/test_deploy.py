"""The files of examples/deploy/ beside the command line, the routes and the environment that they speak of."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml
from yamllint.config import YamlLintConfig
from yamllint.linter import run as lint

from xdit_compile.cache.folder import VARIABLE as CACHE
from xdit_compile.cli.main import main
from xdit_compile.serving.http.guard import OPEN
from xdit_compile.serving.run import KEY_VARIABLE

DEPLOY = Path(__file__).resolve().parents[2] / "examples" / "deploy"
MANIFEST = DEPLOY / "kubernetes.yaml"
END_S = 10
"""Seconds that the ranks have to end beside those of ``--drain``."""
LINTERS = (["hadolint", "Dockerfile"], ["kubernetes-validate", "--strict", "kubernetes.yaml"])


def _flags(words: list[str]) -> dict[str, Any]:
    """What the command line makes of a command, or an error."""
    said = io.StringIO()
    with redirect_stdout(said):
        assert main([*words, "--print_config"]) == 0
    return tomllib.loads(said.getvalue())


def _manifest() -> dict[str, list[Any]]:
    parts: dict[str, list[Any]] = {}
    for each in yaml.safe_load_all(MANIFEST.read_text()):
        parts.setdefault(each["kind"], []).append(each)
    return parts


def test_yaml_is_clean():
    config = YamlLintConfig(file=str(DEPLOY / ".yamllint"))
    assert [str(each) for each in lint(MANIFEST.read_text(), config)] == []


@pytest.mark.parametrize("command", LINTERS, ids=[command[0] for command in LINTERS])
def test_linters_have_nothing_against_them(command: list[str]):
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(command, cwd=DEPLOY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_manifest_starts_the_command_as_it_is():
    parts = _manifest()
    (deployment,), (service,) = parts["Deployment"], parts["Service"]
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    flags = _flags(container["args"])
    assert (flags["host"], flags["port"]) == ("0.0.0.0", container["ports"][0]["containerPort"])
    assert flags["nproc"] == container["resources"]["limits"]["nvidia.com/gpu"]
    waits = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] >= waits + flags["drain"] + END_S
    assert service["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"] == labels == deployment["spec"]["selector"]["matchLabels"]


def test_the_manifest_names_probes_variables_and_volumes_that_are_there():
    parts = _manifest()
    pod = parts["Deployment"][0]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    probes = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "liveness", "readiness")}
    assert probes == {"startup": "/health/live", "liveness": "/health/live", "readiness": "/health/ready"}
    assert set(probes.values()) <= set(OPEN)
    variables = {each["name"]: each for each in container["env"]}
    assert "secretKeyRef" in variables[KEY_VARIABLE]["valueFrom"]
    mounted = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}
    volumes = {each["name"]: each for each in pod["volumes"]}
    assert set(mounted.values()) == set(volumes) and {"/tmp", "/dev/shm"} < set(mounted)
    claims = {each["metadata"]["name"] for each in parts["PersistentVolumeClaim"]}
    claim = volumes[mounted[str(Path(variables[CACHE]["value"]).parent)]]["persistentVolumeClaim"]["claimName"]
    assert claim in claims
    assert pod["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch", "a cache others can write to is refused"


def test_the_image_serves_where_its_probe_looks():
    text = (DEPLOY / "Dockerfile").read_text()
    entry, words = (
        json.loads(re.findall(rf"^{name} (\[.*\])", text, re.MULTILINE)[0]) for name in ("ENTRYPOINT", "CMD")
    )
    assert entry[-1] == "xdit-compile"
    port = _flags(words)["port"]
    assert f"EXPOSE {port}" in text and f"http://127.0.0.1:{port}/health/live" in text
    kept = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    for name in re.findall(r"!(\S+)", " ".join(kept)):
        assert (DEPLOY.parents[1] / name).exists()


def test_the_unit_lets_the_front_end_its_ranks():
    text = (DEPLOY / "xdit-compile.service").read_text().replace("\\\n", " ")
    lines = dict(line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith("#"))
    flags = _flags(shlex.split(lines["ExecStart"])[1:])
    assert int(lines["TimeoutStopSec"]) >= flags["drain"] + END_S
    assert lines["KillMode"] == "mixed" and lines["Environment"].startswith(f"{CACHE}=")
