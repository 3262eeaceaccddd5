"""A scheduler's signal costs nothing, and two runs do not write to one folder."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import SMALL, TINY, assert_same_weights, draw_images, free_port, log_lines, release_locks, weights

import checkpoints
import evaluation
import hooks
import index
import main_finetune
import resume
import utils
from loaders import Loader
from run import Run

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def whole(shared, small, pretrain):
    """The folder of a run of `small` that nothing stopped; made once."""
    if not (shared / "whole").exists():
        assert pretrain(*small, "--picture_freq", 0, "--output_dir", shared / "whole").status == 0
    return shared / "whole"


SIGNALS = [("SIGTERM", 75), ("SIGUSR1", 75), ("SIGINT", 130), ("SIGHUP", 129)]


@pytest.mark.parametrize(("name", "status"), SIGNALS)
def test_after_a_signal_the_step_is_saved_and_the_run_goes_on_from_it(
    name, status, small, whole, pretrain, tmp_path, monkeypatch
):
    flags = [*small, "--picture_freq", 0]
    note = hooks.Console.on_log

    def on_log(console, run):
        note(console, run)
        if (run.epoch, run.step) == (0, 3):
            os.kill(os.getpid(), getattr(signal, name))
            os.kill(os.getpid(), signal.SIGTERM)  # a second one changes nothing

    monkeypatch.setattr(hooks.Console, "on_log", on_log)
    monkeypatch.setattr(utils, "barrier", lambda: os.kill(os.getpid(), signal.SIGTERM))  # nor does one after the save
    folder = tmp_path / "stopped"
    result = pretrain(*flags, "--output_dir", folder, "--print_freq", 1)
    assert result.status == status and f"stopped by {name}: saved; the same command resumes" in result.out
    assert [path.name for path in folder.glob("*.pth")] == ["checkpoint-0-3.pth"]
    monkeypatch.undo()
    assert pretrain(*flags, "--output_dir", folder).status == 0
    assert_same_weights(weights(folder, "checkpoint-1.pth"), weights(whole, "checkpoint-1.pth"))


def test_a_second_ctrl_c_ends_the_run_at_once(small, pretrain, tmp_path, monkeypatch):
    def on_log(console, run):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(hooks.Console, "on_log", on_log)
    result = pretrain(*small, "--output_dir", tmp_path)
    assert result.status == 130 and not list(tmp_path.glob("*.pth"))
    assert result.out.endswith("stopped by Ctrl-C at once; nothing more was saved\n")


def test_a_signal_that_nohup_ignores_stays_ignored():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = resume.StopOnSignal()
        stop.on_start(types.SimpleNamespace())
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.received == 0
        stop.on_end(None)
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_without_an_output_folder_ctrl_c_promises_nothing(small, pretrain, monkeypatch):
    monkeypatch.setattr(hooks.Console, "on_log", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    result = pretrain(*small)
    assert result.status == 130 and "stopped by SIGINT: nothing was saved" in result.out


def test_a_loader_worker_that_is_killed_costs_no_step(small, whole, pretrain, tmp_path, monkeypatch):
    flags = [*small, "--picture_freq", 0]

    def on_log(console, run):
        if (run.epoch, run.step) == (0, 3):
            raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    monkeypatch.setattr(hooks.Console, "on_log", on_log)
    folder = tmp_path / "failed"
    with pytest.raises(RuntimeError, match="is killed by signal"):
        pretrain(*flags, "--output_dir", folder, "--print_freq", 1)
    release_locks()
    assert [path.name for path in folder.glob("*.pth")] == ["checkpoint-0-3.pth"]
    monkeypatch.undo()
    assert pretrain(*flags, "--output_dir", folder).status == 0
    assert_same_weights(weights(folder, "checkpoint-1.pth"), weights(whole, "checkpoint-1.pth"))
    assert log_lines(folder) == log_lines(whole)


def test_an_error_within_the_optimizers_step_saves_nothing(small, pretrain, tmp_path, monkeypatch):
    """Some of the weights may have moved already."""

    def fail(*args, **kwargs):
        raise RuntimeError("half of the weights have moved")

    monkeypatch.setattr(torch.optim.AdamW, "step", fail)
    with pytest.raises(RuntimeError, match="half of the weights"):
        pretrain(*small, "--output_dir", tmp_path)
    release_locks()
    assert not list(tmp_path.glob("*.pth"))


def test_a_signal_within_an_evaluation_gives_it_up(labelled_folder, finetune, tmp_path, monkeypatch):
    flags = [*TINY, "--data_path", labelled_folder, "--epochs", 2, "--warmup_epochs", 1, "--batch_size", 4]
    finetune(*flags, "--output_dir", tmp_path / "whole")
    evaluate = main_finetune.evaluate

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args)

    monkeypatch.setattr(main_finetune, "evaluate", interrupted)
    folder = tmp_path / "stopped"
    result = finetune(*flags, "--output_dir", folder)
    assert result.status == 75 and "evaluation:" not in result.out
    assert [path.name for path in folder.glob("*.pth")] == ["checkpoint-0-5.pth"]
    monkeypatch.undo()
    assert finetune(*flags, "--output_dir", folder).out.count("evaluation:") == 2
    assert_same_weights(weights(folder, "checkpoint-1.pth"), weights(tmp_path / "whole", "checkpoint-1.pth"))
    assert log_lines(folder) == log_lines(tmp_path / "whole")


def test_an_evaluation_that_ends_after_a_signal_counts(labelled_folder, finetune, tmp_path, monkeypatch):
    evaluate = main_finetune.evaluate

    def finished(*args):
        evaluation = evaluate(*args)
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluation

    monkeypatch.setattr(main_finetune, "evaluate", finished)
    flags = [*TINY, "--data_path", labelled_folder, "--epochs", 2, "--warmup_epochs", 1, "--batch_size", 4]
    result = finetune(*flags, "--output_dir", tmp_path)
    assert result.status == 75 and result.out.count("evaluation:") == 1
    assert (tmp_path / "checkpoint-0.pth").exists() and "test_acc1" in log_lines(tmp_path)[0]


def test_a_signal_to_a_run_that_saves_nothing_says_so(small, pretrain, monkeypatch):
    monkeypatch.setattr(hooks.Console, "on_log", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    result = pretrain(*small)
    assert result.status == 128 + signal.SIGTERM and "nothing was saved" in result.out


@pytest.mark.parametrize(("scontrol", "status"), [(-signal.SIGTERM, 75), (1, None)])
def test_a_job_is_queued_again_even_if_that_ends_scontrol(small, pretrain, tmp_path, monkeypatch, scontrol, status):
    """As submitit's handler does, which is in place before training: but what else goes wrong there is told."""

    def requeue(signum, frame):
        assert (tmp_path / "checkpoint-0-5.pth").exists()
        raise subprocess.CalledProcessError(scontrol, "scontrol requeue")

    monkeypatch.setattr(hooks.Console, "on_log", lambda *_: os.kill(os.getpid(), signal.SIGUSR2))
    before = signal.signal(signal.SIGUSR2, requeue)
    try:
        assert pretrain(*small, "--output_dir", tmp_path).status == status
    except subprocess.CalledProcessError:
        assert status is None
    finally:
        signal.signal(signal.SIGUSR2, before)


HOLD_LOCK = """
import sys, time, checkpoints
checkpoints.lock_folder(sys.argv[1])
print("locked", flush=True)
time.sleep(60)
"""


def test_a_second_run_on_a_folder_is_refused(small, pretrain, tmp_path, monkeypatch):
    lock = checkpoints.lock_folder
    monkeypatch.setattr(checkpoints, "lock_folder", lambda folder: lock(folder, timeout=0.1))
    holder = subprocess.Popen([sys.executable, "-c", HOLD_LOCK, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "locked\n"
    result = pretrain(*small, "--output_dir", tmp_path)
    assert result.status == 2 and f"another run writes there: process {holder.pid} on" in result.err
    holder.kill()
    holder.wait()
    assert pretrain(*small, "--epochs", 1, "--output_dir", tmp_path).status == 0


def test_a_loss_that_is_not_finite_names_the_images(small, pretrain, tmp_path, image_folder):
    result = pretrain(*small, "--lr", 1e30, "--warmup_epochs", 0, "--output_dir", tmp_path)
    assert result.status == 1 and "in epoch 0, step" in result.err
    named = (tmp_path / "nonfinite_batch.txt").read_text().splitlines()
    assert len(named) == 4 and set(named) <= {str(path) for path in image_folder.glob("*/*.png")}


def test_a_signal_within_a_probe_gives_it_up(small, labelled_folder, pretrain, tmp_path, monkeypatch):
    flags = [*small, "--picture_freq", 0, "--probe_freq", 1, "--probe_data_path", labelled_folder]
    pretrain(*flags, "--output_dir", tmp_path / "whole")
    collect, calls = evaluation.collect, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:  # 1 and 2 are of the untrained encoder
            os.kill(os.getpid(), signal.SIGTERM)
        return collect(*args, **kwargs)

    monkeypatch.setattr(evaluation, "collect", interrupted)
    folder = tmp_path / "stopped"
    result = pretrain(*flags, "--output_dir", folder)
    assert result.status == 75 and [path.name for path in folder.glob("*.pth")] == ["checkpoint-0-5.pth"]
    monkeypatch.undo()
    assert pretrain(*flags, "--output_dir", folder).status == 0
    assert_same_weights(weights(folder, "checkpoint-1.pth"), weights(tmp_path / "whole", "checkpoint-1.pth"))
    assert log_lines(folder) == log_lines(tmp_path / "whole")


@pytest.fixture
def stalling_images(tmp_path, monkeypatch):
    """Images of which one, once the first two epochs' worth of steps are under way, takes an hour to read."""
    folder = tmp_path / "images"
    draw_images(folder, 8, ("a", "b"), (32, 32))
    read = index.read_file

    def stall(path):
        if path.endswith("05.png") and (folder / "stalled").exists():
            time.sleep(3600)
        return read(path)

    monkeypatch.setattr(index, "read_file", stall)
    return folder


def stall_after_a_step(folder, monkeypatch, then=lambda: None):
    """From the first log line on reading stalls; then() is called in a thread, when the next step waits."""
    note = hooks.Console.on_log

    def on_log(console, run):
        note(console, run)
        (folder / "stalled").touch()

    monkeypatch.setattr(hooks.Console, "on_log", on_log)

    def watch():
        while not (folder / "stalled").exists() or time.monotonic() - (Loader.waiting_since or math.inf) < 0.7:
            time.sleep(0.02)
        then()

    threading.Thread(target=watch, daemon=True).start()


STALLING = [*SMALL, "--batch_size", 2, "--num_workers", 1, "--epochs", 9, "--warmup_epochs", 1, "--print_freq", 1]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_signal_is_heard_while_an_image_stalls(workers, stalling_images, pretrain, tmp_path, monkeypatch):
    stall_after_a_step(stalling_images, monkeypatch, lambda: os.kill(os.getpid(), signal.SIGTERM))
    check_that_all_steps_are_saved(pretrain, stalling_images, tmp_path, "--num_workers", workers)


def test_a_signal_is_heard_if_the_step_under_way_stalls_after_it(small, pretrain, tmp_path, monkeypatch):
    add_losses = Run.add_losses

    def stall_and_stop(run, losses):
        add_losses(run, losses)
        if run.step == 1:
            monkeypatch.setattr(index, "read_file", lambda path: time.sleep(0.5))
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "add_losses", stall_and_stop)
    monkeypatch.setattr(resume.StopOnSignal, "GRACE", 0.1)
    result = pretrain(*small, "--batch_size", 2, "--update_freq", 2, "--output_dir", tmp_path)
    assert result.status == 75 and [path.name for path in tmp_path.glob("*.pth")] == ["checkpoint-0-1.pth"]


def test_a_rank_does_not_wait_for_a_stalled_image_nor_for_the_others(stalling_images, pretrain, tmp_path, monkeypatch):
    """Of several ranks: here the only one."""
    for name, value in dict(
        RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, MASTER_ADDR="localhost", MASTER_PORT=free_port()
    ).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(resume.StopOnSignal, "GRACE", 1)
    monkeypatch.setattr(os, "_exit", sys.exit)
    stall_after_a_step(stalling_images, monkeypatch, lambda: os.kill(os.getpid(), signal.SIGTERM))
    try:
        check_that_all_steps_are_saved(pretrain, stalling_images, tmp_path)
        assert dist.is_initialized()  # it left without the others
    finally:
        dist.destroy_process_group()


def check_that_all_steps_are_saved(pretrain, images, tmp_path, *flags):
    folder = tmp_path / "out"
    result = pretrain(*STALLING, "--data_path", images, "--output_dir", folder, "--picture_freq", 0, *flags)
    assert result.status == 75 and "stopped by SIGTERM: saved" in result.out
    step = max(checkpoints.checkpoint_position(path) for path in folder.glob("*.pth"))
    assert 4 * step[0] + step[1] == result.out.count("  loss ")


def test_a_stalled_image_is_named(stalling_images, pretrain, monkeypatch):
    stall_after_a_step(stalling_images, monkeypatch)
    result = pretrain(*STALLING, "--data_path", stalling_images, "--data_timeout", 1)
    assert result.status == 1 and result.err.count("\n") == 1
    assert "no batch came within --data_timeout 1 seconds" in result.err and "05.png" in result.err
