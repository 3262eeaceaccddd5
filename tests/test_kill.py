"""A run that is killed again and again ends with the weights of one that was not, bit for bit.

The long form: pytest tests/test_kill.py --kills 30 --terms 10
"""

import itertools
import os
import random
import signal
import time

import pytest
from conftest import SMALL, Fork, assert_same_weights, finish, log_lines, weights

import checkpoints
import main_pretrain
import utils


@pytest.fixture
def kills(request):
    return request.config.getoption("--kills")


@pytest.fixture
def terms(request):
    return request.config.getoption("--terms")


def flags_of(images, folder, epochs):
    """Of a run of 5 steps an epoch that takes half a second for a step and its checkpoint."""
    flags = [*SMALL, "--data_path", images, "--output_dir", folder, "--epochs", epochs, "--num_workers", 2]
    flags += "--batch_size 2 --update_freq 2 --use_amp true --warmup_epochs 1 --picture_freq 0".split()
    return [*flags, "--print_freq", 1, "--save_ckpt_steps", 1]


def half_written(folder):
    return list(folder.glob(".checkpoint-*.tmp"))


def wait_for_moment(process, moment, folder, rng):
    """Let a run go on until its start-up, a step or a save is under way."""
    if moment == "start":
        return time.sleep(rng.uniform(0, 2))
    lines = (line for line in process.stdout if line.startswith("epoch "))
    list(itertools.islice(lines, rng.randint(1, 3)))
    if moment == "step":
        return time.sleep(rng.uniform(0, 0.5))
    while not half_written(folder) and process.poll() is None:
        time.sleep(0.001)


def interrupt(flags, signum, moment, folder, rng):
    """Start a run and send it a signal at that moment. Returns its exit status."""
    process = Fork(main_pretrain, flags)
    wait_for_moment(process, moment, folder, rng)
    if signum == signal.SIGKILL:
        os.killpg(process.pid, signum)  # its loader workers too
    else:
        process.send_signal(signum)
    process.stdout.read()
    return process.wait()


def test_interrupted_at_random_moments_it_ends_with_the_same_weights(image_folder, tmp_path, kills, terms):
    rng = random.Random(0)
    moments = zip([signal.SIGKILL] * kills, itertools.cycle(["save", "step", "start"]), strict=False)
    plan = [*moments, *((signal.SIGTERM, "step") for _ in range(terms))]
    rng.shuffle(plan)
    epochs = max(2, len(plan))
    reference, folder = tmp_path / "uninterrupted", tmp_path / "interrupted"
    folder.mkdir()
    finish(Fork(main_pretrain, flags_of(image_folder, reference, epochs)))
    flags, within_a_save = flags_of(image_folder, folder, epochs), 0
    for signum, moment in plan:
        status = interrupt(flags, signum, moment, folder, rng)
        assert status == (utils.STOPPED if signum == signal.SIGTERM else -signal.SIGKILL)
        within_a_save += bool(half_written(folder))
        for path in folder.glob("checkpoint-*"):
            checkpoints.load_checkpoint(path)
    assert within_a_save >= kills // 3
    assert "resuming from" in finish(Fork(main_pretrain, flags))
    final = f"checkpoint-{epochs - 1}.pth"
    assert_same_weights(weights(folder, final), weights(reference, final))
    assert not list(folder.glob(".*"))  # nor is a half-written file left
    assert log_lines(folder) == log_lines(reference)
