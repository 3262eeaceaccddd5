"""Several ranks train as one, resume exactly, and end together when one of them dies."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import (
    SMALL,
    TINY,
    Fork,
    assert_same_weights,
    draw_images,
    end,
    finish,
    free_port,
    log_lines,
    start_ranks,
    weights,
)  # fmt: skip
from torch.nn.parallel import DistributedDataParallel

import main_finetune
import main_pretrain

ROOT = Path(__file__).resolve().parent.parent
STEPS = 4  # an epoch, of 8 images
FLAGS = f"--epochs 2 --warmup_epochs 1 --save_ckpt_steps {STEPS // 2} --print_freq 1".split()
MIDDLE, LAST = f"checkpoint-0-{STEPS // 2}.pth", "checkpoint-1.pth"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Class folders in train/ and val/, of 48 and 7 images."""
    folder = tmp_path_factory.mktemp("many")
    classes = [f"class{number}" for number in range(5)]
    draw_images(folder / "train", 8 * STEPS, classes, (32, 32), seed=1)
    draw_images(folder / "val", 7, classes, (32, 32), seed=2)
    return folder


@pytest.fixture(scope="session")
def recipes(images):
    """The flags of each script; SGD, as Adam would enlarge roundings where a gradient is nearly 0.

    Without random erasing, which each rank draws for its batch: the same samples on one rank and on two.
    """
    probes = f"--probe_freq 1 --probe_data_path {images} --probe_images_per_class 2 --watch probe_linear".split()
    finetune = [*TINY, *"--opt sgd --lr 0.05 --aa none --reprob 0 --head_init_scale 1".split()]
    return {
        "main_pretrain": [*SMALL, "--data_path", str(images), *"--picture_freq 0 --blr 3e-3".split(), *probes, *FLAGS],
        "main_finetune": [*finetune, "--data_path", str(images), *FLAGS],
    }


def start(module, *flags, launcher):
    """Start a script by a launcher, with one thread a process."""
    command = [sys.executable, *launcher, f"{module.__name__}.py", *flags]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen([*map(str, command)], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)


def process_of_rank(rank, parent):
    """The child of a launcher with that rank."""
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        if f"\0RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
            return int(child)
    raise AssertionError(f"{parent} has no child of rank {rank}")


def wait_for(process, line):
    """Read what a process prints until a line begins with `line`."""
    for text in process.stdout:
        if text.startswith(line):
            return
    raise AssertionError(f"{line!r} was not printed")


class Runs:
    """Whole runs of one script: of 2 ranks x batch 4, of 1 x 8, and of 1 x 4 with 2 accumulated."""

    def __init__(self, module, flags, folder):
        self.module, self.flags = module, flags
        self.two, self.one, self.accumulated = (folder / name for name in ("two", "one", "accumulated"))
        self.run_on_two(self.two)
        for output, batch in (
            (self.one, ["--batch_size", 8]),
            (self.accumulated, ["--batch_size", 4, "--update_freq", 2]),
        ):
            finish(Fork(module, [*flags, *batch, "--output_dir", output]))

    def run_on_two(self, folder):
        return [finish(process) for process in self.start_two(folder)][0]

    def start_two(self, folder, *options, **more):
        return start_ranks(self.module, *self.flags, "--batch_size", 4, "--output_dir", folder, *options, **more)


@pytest.fixture(scope="session", params=[main_pretrain, main_finetune], ids=lambda module: module.__name__)
def runs(request, recipes, tmp_path_factory):
    name = request.param.__name__
    return Runs(request.param, recipes[name], tmp_path_factory.mktemp(name))


pretraining = pytest.mark.parametrize("runs", [main_pretrain], indirect=True, ids=["main_pretrain"])


def assert_close(run, other):
    """Losses and weights to float32 rounding, which is little of the way that the weights went."""
    a, b, start = weights(run, LAST), weights(other, LAST), weights(run, MIDDLE)
    way = max((a[name] - start[name]).abs().max() for name in a)
    apart = max((a[name] - b[name]).abs().max() for name in a)
    assert apart < way / 500, (apart, way)
    logs = [log_lines(folder) for folder in (run, other)]
    assert len(logs[0]) == 2
    for one, two in zip(*logs, strict=True):
        assert one == pytest.approx(two, rel=1e-4)
    if (run / "confusion.csv").exists():
        assert (run / "confusion.csv").read_bytes() == (other / "confusion.csv").read_bytes()


def assert_same(run, other):
    assert_same_weights(weights(run, LAST), weights(other, LAST))


def copy_middle(run, folder):
    """A folder in which a run stopped in the middle of its first epoch."""
    folder.mkdir()
    shutil.copy(run / MIDDLE, folder)
    return folder


def test_two_ranks_and_accumulation_train_as_one(runs):
    assert_close(runs.one, runs.two)
    assert_close(runs.one, runs.accumulated)


def test_as_many_processes_go_on_bit_for_bit_whatever_starts_them(runs, tmp_path):
    folder = copy_middle(runs.two, tmp_path / "run")
    if runs.module is main_pretrain:
        launcher = ("-m", "torch.distributed.launch", "--nproc_per_node=2", "--master_port", free_port())
        out = finish(start(runs.module, *runs.flags, "--batch_size", 4, "--output_dir", folder, launcher=launcher))
    else:
        out = runs.run_on_two(folder)
    assert f"resuming from {folder / MIDDLE}: epoch 0, step {STEPS // 2}" in out and "2 ranks" in out
    assert_same(runs.two, folder)


@pretraining
def test_another_number_of_processes_goes_on_with_the_same_batches(runs, tmp_path):
    folder = copy_middle(runs.two, tmp_path / "from two to one")
    finish(Fork(runs.module, [*runs.flags, "--batch_size", 8, "--output_dir", folder]))
    assert_close(runs.one, folder)
    folder = copy_middle(runs.one, tmp_path / "from one to two")
    runs.run_on_two(folder)
    assert_close(runs.one, folder)


@pretraining
def test_a_mistake_or_a_loss_that_is_not_finite_on_one_process_ends_all_with_one_line(runs, tmp_path):
    ends = [end(process) for process in runs.start_two(tmp_path, second=["--data_path", "/nowhere"])]
    (status, out), (other_status, other_out) = ends
    assert status == other_status == 2 and "Traceback" not in out + other_out and "error" not in other_out
    assert f"error: rank 1, on {socket.gethostname()}: --data_path /nowhere" in out
    _, (status, out) = [end(process) for process in runs.start_two(tmp_path, second=["--min_lr", 1])]
    assert status == 2 and f"error: rank 1, on {socket.gethostname()}: --min_lr 1.0: must be at most" in out
    ends = [end(process) for process in runs.start_two(tmp_path, "--lr", 1e30, "--warmup_epochs", 0)]
    assert [status for status, _ in ends] == [1, 1]
    assert "in epoch 0, step" in ends[0][1] and "error" not in ends[1][1]
    assert len(set((tmp_path / "nonfinite_batch.txt").read_text().splitlines())) == 8  # of both


def test_only_the_last_accumulation_step_averages_gradients(images, pretrain, monkeypatch, tmp_path):
    calls = []
    no_sync = DistributedDataParallel.no_sync
    monkeypatch.setattr(DistributedDataParallel, "no_sync", lambda model: calls.append(1) or no_sync(model))
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}.items():
        monkeypatch.setenv(name, str(value))
    flags = [*SMALL, "--data_path", images, "--epochs", 1, "--warmup_epochs", 0, "--batch_size", 2, "--update_freq", 4]
    assert pretrain(*flags).status == 0
    assert len(calls) == 3 * STEPS


@pretraining
def test_a_signal_to_one_process_stops_all_at_the_same_step(runs, tmp_path):
    processes = runs.start_two(tmp_path, "--save_ckpt_steps", 0)
    wait_for(processes[0], "epoch 0/2  step 3/")
    processes[1].send_signal(signal.SIGUSR2)
    processes[1].send_signal(signal.SIGTERM)
    ends = [end(process) for process in processes]
    assert [status for status, _ in ends] == [75, 75], ends
    assert re.search("stopped by SIG(USR2|TERM)", ends[0][1])  # whichever of the two its threads take first
    assert len(list(tmp_path.glob("*.pth"))) == 1
    runs.run_on_two(tmp_path)
    assert_same(runs.two, tmp_path)


@pretraining
def test_after_a_kill_torchrun_restarts_from_the_newest_checkpoint(runs, tmp_path):
    flags = [*runs.flags, *"--batch_size 4 --probe_freq 0 --watch train_loss --output_dir".split(), tmp_path]
    torchrun = start(runs.module, *flags, launcher=[*TORCHRUN, "--max-restarts=1"])
    wait_for(torchrun, "epoch 1/2  step 2/")
    os.kill(process_of_rank(1, torchrun.pid), signal.SIGKILL)
    assert "resuming from" in finish(torchrun)
    assert_same(runs.two, tmp_path)


@pretraining
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["dead", "silent"])
def test_when_one_process_goes_the_other_ends_too(runs, tmp_path, how):
    processes = runs.start_two(tmp_path, "--dist_timeout", 10)
    wait_for(processes[0], "epoch 0/2  step 3/")
    processes[1].send_signal(how)
    begin = time.monotonic()
    status, out = end(processes[0], seconds=60)
    assert status == 1 and "rank 0 of 2, on" in out
    assert time.monotonic() - begin < 25
    processes[1].kill()
