"""The page on Slurm and Kubernetes: its files parse, and name only options that exist.

Neither was run on such machines; the page says so.
"""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
from typing import Any

import pytest
import torch.distributed as dist
import yaml
from torch.distributed.run import get_args_parser

from ddp_lessons import launch
from tests.support.checkout import ROOT

PAGE = ROOT / "notebooks" / "clusters.md"
TEXT = PAGE.read_text()
# Of sbatch's and srun's manuals, those that may be needed here.
SBATCH = {
    "account", "constraint", "cpus-per-task", "error", "exclusive", "gpus-per-node", "gres",
    "job-name", "mem", "nodes", "ntasks-per-node", "open-mode", "output", "partition", "qos",
    "requeue", "signal", "time",
}  # fmt: skip
SRUN = {"cpus-per-task", "kill-on-bad-exit", "label", "nodes", "ntasks", "output"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.M | re.S)


def sbatch_script() -> str:
    (script,) = (block for block in blocks("bash") if block.startswith("#!/bin/bash"))
    return script


def manifests() -> dict[str, Any]:
    (text,) = blocks("yaml")
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def srun_line() -> list[str]:
    (line,) = re.findall(r"^srun .*?[^\\]$", sbatch_script(), re.M | re.S)
    return shlex.split(line.replace("\\\n", " "))


def names(options: list[str]) -> set[str]:
    return {option.lstrip("-").partition("=")[0] for option in options}


def test_the_page_says_what_it_is() -> None:
    assert "Checked for syntax only" in TEXT
    assert max(map(len, TEXT.splitlines())) < 160
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert target.startswith("https://") or (PAGE.parent / target).exists(), target


@pytest.mark.system
@pytest.mark.parametrize("script", blocks("bash"))
def test_shell_scripts_parse(script: str) -> None:
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_options_of_slurm_are_known() -> None:
    lines = sbatch_script().splitlines()
    options = [line.split()[1] for line in lines if line.startswith("#SBATCH")]
    assert names(options) <= SBATCH
    assert {"nodes", "ntasks-per-node", "gpus-per-node", "time", "signal"} <= names(options)
    last = max(n for n, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert all(line.startswith("#") for line in lines[:last])  # Slurm reads no further
    line = srun_line()
    assert names(line[1 : line.index("torchrun")]) <= SRUN


def torchrun_lines() -> list[list[str]]:
    line = srun_line()
    shell = [shlex.split(found) for found in re.findall(r"^torchrun .*$", TEXT, re.M)]
    container = manifests()["Job"]["spec"]["template"]["spec"]["containers"][0]
    return [line[line.index("torchrun") :], *shell, [*container["command"], *container["args"]]]


def test_options_of_torchrun_exist() -> None:
    lines = torchrun_lines()
    assert len(lines) == 3
    for program, *options in lines:
        assert program == "torchrun"
        parsed = get_args_parser().parse_args(options)
        assert parsed.training_script.endswith("train.py")
        assert parsed.standalone or (parsed.rdzv_backend == "c10d" and parsed.rdzv_endpoint)


def test_both_jobs_are_of_two_machines_with_four_gpus() -> None:
    for _, *options in (line for line in torchrun_lines() if "--standalone" not in line):
        assert "--nproc-per-node=4" in options
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=1\n" in sbatch_script()
    assert "#SBATCH --gpus-per-node=4\n" in sbatch_script()
    job = manifests()["Job"]["spec"]
    assert job["completions"] == job["parallelism"] == 2
    assert "--nnodes=2" in job["template"]["spec"]["containers"][0]["args"]


def test_there_is_time_to_save() -> None:
    pod = manifests()["Job"]["spec"]["template"]["spec"]
    (seconds,) = set(re.findall(r"--shutdown-timeout=(\d+)", TEXT))
    (warning,) = re.findall(r"--signal=TERM@(\d+)", sbatch_script())
    assert int(seconds) < min(int(warning), pod["terminationGracePeriodSeconds"])


def test_the_job_has_what_kubernetes_asks_for() -> None:
    service, job = manifests()["Service"], manifests()["Job"]
    assert (service["apiVersion"], job["apiVersion"]) == ("v1", "batch/v1")
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    spec = job["spec"]
    assert spec["completionMode"] == "Indexed"
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert pod["subdomain"] == service["metadata"]["name"]
    (container,) = pod["containers"]
    assert container["image"]
    assert all(isinstance(argument, str) for argument in container["args"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 4
    endpoint = f"--rdzv-endpoint={job['metadata']['name']}-0.{service['metadata']['name']}:"
    assert any(argument.startswith(endpoint) for argument in container["args"])


def test_every_volume_is_there_and_mounted() -> None:
    pod = manifests()["Job"]["spec"]["template"]["spec"]
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert mounts.keys() == volumes.keys()
    assert mounts["shm"] == "/dev/shm"
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
    assert f"configmap {volumes['script']['configMap']['name']} " in TEXT


@pytest.mark.ranks
def test_all_end_together() -> None:
    """The snippet, run for real: only rank 1 is told to end."""
    (snippet,) = blocks("python")

    def work(rank: int) -> list[bool]:
        scope: dict[str, Any] = {}
        exec(snippet, scope)
        dist.init_process_group("gloo")
        before = scope["all_end"]("cpu")
        if rank == 1:
            signal.raise_signal(signal.SIGTERM)
        after = scope["all_end"]("cpu")
        dist.destroy_process_group()
        return [before, after]

    assert launch(work, nprocs=3).values == [[False, True]] * 3
