"""A run killed with SIGKILL at random steps and started again ends with the same weights, bit for bit."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SMALL, assert_same_weights, weights

ROOT = Path(__file__).resolve().parent.parent


def command(image_folder, output_dir, *flags):
    run = [sys.executable, "main_pretrain.py", *SMALL, "--data_path", image_folder, "--output_dir", output_dir]
    run += "--epochs 2 --warmup_epochs 1 --batch_size 2 --update_freq 2 --print_freq 1 --save_ckpt_steps 1".split()
    return [*map(str, run), *flags, "--picture_freq", "0"]


def run_and_kill(command, after, delay):
    """Start a run and kill it `delay` seconds after its `after`-th log line. Returns its exit status."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    lines = 0
    for line in process.stdout:
        lines += line.startswith("epoch ")
        if lines >= after:
            try:
                process.wait(delay)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # its loader workers too
            break
    return process.wait()


@pytest.mark.parametrize("amp", ["false", "true"], ids=["float32", "bfloat16"])
def test_killed_at_random_it_ends_with_the_same_weights(image_folder, tmp_path, amp):
    reference = tmp_path / "uninterrupted"
    flags = ["--use_amp", amp]
    subprocess.run(command(image_folder, reference, *flags), cwd=ROOT, check=True, capture_output=True)
    rng = random.Random(amp)
    for workers in ("0", "2"):
        folder = tmp_path / f"killed-{workers}"
        run = command(image_folder, folder, *flags, "--num_workers", workers)
        for _ in range(2):
            # a step with its save takes about half a second: the kill falls anywhere in it
            assert run_and_kill(run, after=rng.randint(2, 4), delay=rng.random() * 0.5) == -signal.SIGKILL
        last = subprocess.run(run, cwd=ROOT, check=True, capture_output=True, text=True)
        assert "goes on from" in last.stdout
        assert_same_weights(weights(folder, "checkpoint-1.pth"), weights(reference, "checkpoint-1.pth"))
        assert not list(folder.glob(".*"))  # nor is a half-written file left
        assert (folder / "log.txt").read_text() == (reference / "log.txt").read_text()
