"""The scripts for clusters: what they ask the scheduler for, and that a job of a real Slurm cannot be lost."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import assert_same_weights, free_port, run_here, weights

import submitit_finetune
import submitit_pretrain

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"submitit_pretrain": submitit_pretrain.main, "submitit_finetune": submitit_finetune.main}
PRETRAIN, FINETUNE = SCRIPTS
DIGITS = (
    "--data_set DIGITS --model convnextv2_atto --input_size 32 --stem_stride 1 --in_chans 1 --num_workers 0".split()
)
ON_CPU = "--device cpu --cpus_per_task 1".split()


@pytest.fixture
def submit(monkeypatch, capsys, tmp_path):
    """submit(script, *flags): run a submitting script in this process, in tmp_path: its exit status and output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))  # to be restored

    def run(script, *flags):
        return run_here(SCRIPTS[script], [f"{script}.py", *DIGITS, *flags], monkeypatch, capsys)

    return run


# ---------------------------------------------------------------- what is asked for


@pytest.fixture
def scheduler(tmp_path, monkeypatch):
    """An `sbatch` that keeps what it is given and refuses the partition `nowhere`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "srun").write_text("")
    (folder / "sbatch").write_text(
        f"#!/bin/sh\ncp $1 {tmp_path}/submission.sh\n"
        "grep -q nowhere $1 && { echo 'sbatch: error: invalid partition specified: nowhere' >&2; exit 1; }\n"
        "echo Submitted batch job 12\n"
    )
    for program in folder.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def asked(folder):
    """The options in the submission: {name: value}."""
    lines = (folder / "submission.sh").read_text().splitlines()
    options = (line.removeprefix("#SBATCH --").partition("=") for line in lines if line.startswith("#SBATCH --"))
    return {name: value for name, _, value in options}


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_originals_flags_and_defaults(scheduler, submit, tmp_path, script):
    result = submit(script, "--use_volta32", "--comment", "a paper", "--partition", "long")
    assert result.status == 0, result.err
    folder = tmp_path / "jobs" / "12"
    assert f"job 12: logs in {folder}, checkpoints and TensorBoard in {folder}\n" in result.out
    assert f"tail -f {folder}/12_0_log.out" in result.out and (folder / "12_submitted.pkl").exists()
    expected = {"nodes": "2", "ntasks-per-node": "8", "gpus-per-node": "8", "cpus-per-task": "10", "mem": "320GB"}
    expected |= {"time": "4320", "partition": "long", "constraint": "volta32gb", "comment": "'a paper'"}
    expected |= {"signal": "USR2@120", "job-name": script.replace("submitit", "convnextv2")}
    options = asked(tmp_path)
    assert {name: options[name] for name in expected} == expected and "requeue" in options
    assert "account" not in options and "qos" not in options


def test_the_other_flags_of_the_cluster(scheduler, submit, tmp_path):
    flags = "--nodes 3 --ngpus 4 --timeout 60 --account mine --qos high --mem_gb 12 --cpus_per_task 6".split()
    flags += ["--constraint", "a100", "--use_volta32", "--job_dir", tmp_path / "of" / "%j"]
    assert submit(PRETRAIN, *flags).status == 0
    expected = {"nodes": "3", "ntasks-per-node": "4", "gpus-per-node": "4", "time": "60", "account": "mine"}
    expected |= {"qos": "high", "mem": "12GB", "cpus-per-task": "6", "constraint": "'a100&volta32gb'"}
    options = asked(tmp_path)
    assert {name: options[name] for name in expected} == expected and "partition" not in options
    assert (tmp_path / "of" / "12" / "12_submitted.pkl").exists()


def test_without_gpus_none_are_asked_for(scheduler, submit, tmp_path):
    assert submit(PRETRAIN, *ON_CPU, "--ngpus", 1).status == 0
    assert not {"gpus-per-node", "mem"} & asked(tmp_path).keys()


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--nodes 0", "--nodes 0: must be a whole number, at least 1"),
        ("--mem_gb 0", "--mem_gb 0: must be a number above 0"),
        ("--cluster local --nodes 2", "--nodes 2 --ngpus 8: --cluster local takes --nodes 1 only"),
        ("--cluster debug --ngpus 2", "--cluster debug takes --nodes 1 --ngpus 1 only"),
        ("--partition nowhere", "--cluster slurm: sbatch: error: invalid partition specified: nowhere"),
        ("--model convnextv2_tini", "invalid choice: 'convnextv2_tini'"),
        ("--device tpu", "--device tpu: must be cpu, cuda or cuda:N"),
    ],
)
def test_mistakes_are_reported_before_the_job_waits(scheduler, submit, tmp_path, flags, message):
    result = submit(PRETRAIN, *flags.split())
    assert result.status == 2 and message in result.err
    assert "Traceback" not in result.err and not list(Path("jobs").glob("*/*.pth"))


def test_where_there_is_no_slurm_the_error_says_so(submit, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    result = submit(PRETRAIN)
    assert result.status == 2 and "srun" in result.err and len(result.err.splitlines()) == 1


def test_debug_trains_here(submit, tmp_path):
    flags = [*ON_CPU, *"--cluster debug --epochs 1 --warmup_epochs 0".split()]
    result = submit(FINETUNE, *flags, "--images_per_class", 8, "--batch_size", 16)
    assert result.status == 0 and "trained 1 epochs" in result.out, result.err
    assert list(tmp_path.glob("jobs/DEBUG_*/checkpoint-0.pth"))


# ---------------------------------------------------------------- a real Slurm of two nodes

PROGRAMS = ("slurmctld", "slurmd", "munged")
needs_slurm = pytest.mark.skipif(
    not (all(map(shutil.which, PROGRAMS)) and os.getuid() == 0) and not os.environ.get("REQUIRE_SLURM"),
    reason="no Slurm to start here: that takes root and the Debian packages slurm-wlm and munge",
)

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
MpiDefault=none
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=4000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=4000
PartitionName=debug Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
"""


def slurm_says(*command):
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def wait_until(what, happened, seconds):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, what
        time.sleep(0.3)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """Start a Slurm of two nodes, n1 and n2, on this machine; its clients find it in the environment."""
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    ports = [free_port() for _ in range(3)]
    host = socket.gethostname().split(".")[0]
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, host=host, ports=ports))
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    munge = {f"--{name}-file": folder / f"munge.{name}" for name in ("key", "pid", "log", "seed")}
    options = [f"{name}={path}" for name, path in munge.items()]
    subprocess.run(["munged", "--force", f"--socket={folder}/munge.socket", *options], check=True)
    try:
        subprocess.run(["slurmctld"], check=True)
        for node in ("n1", "n2"):
            subprocess.run(["slurmd", "-N", node], check=True)
        wait_until("two idle nodes", lambda: slurm_says("sinfo", "-h", "-o", "%D %t") == "2 idle", 60)
        yield folder
    finally:
        slurm_says("scancel", "--user=root")
        for file in folder.glob("*.pid"):
            os.kill(int(file.read_text()), signal.SIGTERM)
        del os.environ["SLURM_CONF"]


def state(job):
    return slurm_says("squeue", "-h", "-j", job, "-o", "%t")


def start_now(job):
    """Slurm lets a job that was queued again wait two minutes: not this one."""
    wait_until(f"{job} is queued again", lambda: state(job) == "PD", 60)
    slurm_says("scontrol", "update", f"jobid={job}", "starttime=now")
    wait_until(f"{job} runs again", lambda: state(job) == "R", 60)


@needs_slurm
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_job_on_two_nodes_that_is_interrupted_ends_as_if_it_had_not_been(
    slurm, submit, tmp_path, monkeypatch, script, request
):
    if script == FINETUNE and request.config.getoption("--rounds") == 1:
        pytest.skip("the same wrapper as of pre-training; --rounds 2 runs it")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = [*ON_CPU, *"--nodes 2 --ngpus 1 --epochs 1 --warmup_epochs 0 --batch_size 16 --print_freq 1".split()]
    flags += {PRETRAIN: "--decoder_embed_dim 16 --picture_freq 0", FINETUNE: "--images_per_class 40"}[script].split()
    jobs = [submit(script, *flags).out.split()[1].rstrip(":") for _ in range(2)]
    folders = [tmp_path / "jobs" / job for job in jobs]

    def output(rank=0):
        path = folders[1] / f"{jobs[1]}_{rank}_log.out"
        return path.read_text() if path.exists() else ""  # the job may run a moment before it writes

    def steps():
        return output().count("epoch 0/1  step")

    for number, interrupt in enumerate((["scancel", "--signal=USR2"], ["scontrol", "requeue"]), start=1):
        before = steps() if number > 1 else 0
        wait_until("three more steps", lambda before=before: state(jobs[1]) == "R" and steps() >= before + 3, 240)
        slurm_says(*interrupt, jobs[1])
        start_now(jobs[1])
        assert len(list(folders[1].glob("checkpoint-0-*.pth"))) == number
    for job, folder in zip(jobs, folders, strict=True):
        wait_until(f"{job} is done", lambda job=job: not state(job), 240)
        assert (folder / "checkpoint-0.pth").exists(), (folder / f"{job}_0_log.err").read_text()
    assert output().count("resuming from /") == 2 and "2 ranks" in output()
    assert_same_weights(*(weights(folder, "checkpoint-0.pth") for folder in folders))
    assert len(list(folders[1].glob("rendezvous-*"))) <= 1  # of three starts
    assert "Traceback" not in (folders[1] / f"{jobs[1]}_0_log.err").read_text()


REPORT = """
import argparse, utils, torch.distributed as dist
flags = {"dist_on_itp": False, "dist_url": "env://", "local_rank": -1, "world_size": 1, "dist_timeout": 30}
args = argparse.Namespace(device="cpu", **flags)
utils.init_distributed_mode(args)
print(f"process {utils.get_rank()} of {dist.get_world_size() if dist.is_initialized() else 'one'}")
"""


@needs_slurm
def test_srun_starts_a_distributed_run_which_a_shell_of_salloc_does_not(slurm, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "report.py").write_text(REPORT)
    command = [sys.executable, tmp_path / "report.py"]
    assert sorted(slurm_says("srun", "-N2", "-n2", *command).splitlines()) == ["process 0 of 2", "process 1 of 2"]
    assert slurm_says("salloc", "-N2", "-n2", *command) == "process 0 of one"
    mistake = ["srun", "-N2", "-n2", sys.executable, ROOT / "main_pretrain.py", *DIGITS, "--mask_ratio", "5"]
    result = subprocess.run(mistake, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("main_pretrain.py: error: --mask_ratio 5") == 1
