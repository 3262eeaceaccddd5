"""The tools: pictures from any checkpoint with a decoder, and the benchmark's figures."""

import argparse
import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
FIXTURE = ROOT / "tests" / "fcmae_minkowski.safetensors"


@pytest.fixture
def tool(monkeypatch, capsys):
    """Run `python -m tools.NAME FLAGS` in this process: status, standard output, standard error."""

    def run(name, *flags):
        monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
        status = 0
        try:
            runpy.run_module(f"tools.{name}", run_name="__main__")
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def original(tmp_path):
    """A checkpoint as the original's Minkowski training writes it, flags pickled as a Namespace."""
    state = {k.removeprefix("state."): v for k, v in load_file(FIXTURE).items() if k.startswith("state.")}
    path = tmp_path / "original.pth"
    torch.save({"model": state, "epoch": 3, "args": argparse.Namespace(input_size=128, mask_ratio=0.5)}, path)
    return path


def test_reconstruct_draws_from_a_checkpoint_of_the_original(tool, original, tmp_path, image_folder):
    images = sorted(image_folder.glob("*/*.png"))[:3]
    picture = tmp_path / "picture.png"
    status, out, _ = tool("reconstruct", "--checkpoint", original, "--images", *images, "--output", picture)
    assert status == 0 and "3 images, mask ratio 0.5" in out
    drawn = np.asarray(Image.open(picture)).astype(int)
    assert drawn.shape == (16 + 2 * 132, 2 * (3 * 132 + 8), 3)  # 128 pixels, 2 rows of 2
    first, masked, reconstruction = (drawn[16:144, 4 + 132 * j :][:, :128] for j in range(3))
    grey = (masked == 127).all(-1)
    assert grey.mean() == pytest.approx(0.5, abs=0.02)
    assert np.array_equal(first[~grey], reconstruction[~grey]) and not np.array_equal(first[grey], reconstruction[grey])


@pytest.mark.parametrize(
    "flags, word",
    [
        ("--checkpoint /no/such.pth", "/no/such.pth: No such file"),
        ("--images /no/such.jpg", "/no/such.jpg: cannot be read"),
        ("--output /no/such/folder/a.png", "/no/such/folder/a.png: No such file"),
        ("--output /tmp/picture", "/tmp/picture: unknown file extension"),
        ("--input_size 100", "100: must be one or two multiples of 32"),
        ("--mask_ratio 1", "--mask_ratio 1.0: must be between 0 and 1"),
    ],
)
def test_reconstruct_tells_mistakes_in_one_line(tool, original, tmp_path, image_folder, flags, word):
    image = next(image_folder.glob("*/*.png"))
    good = ["--checkpoint", original, "--images", image, "--output", tmp_path / "a.png"]
    status, _, err = tool("reconstruct", *good, *flags.split())
    assert status == 2 and word in err and len(err.splitlines()) == 1


def test_reconstruct_refuses_an_encoder_alone(tool, tmp_path, image_folder):
    path = tmp_path / "encoder.pth"
    torch.save({"model": {"encoder.downsample_layers.0.0.weight": torch.zeros(8, 3, 4, 4)}}, path)
    status, _, err = tool("reconstruct", "--checkpoint", path, "--images", image_folder)
    assert status == 2 and "no proj.weight, mask_token, pred.weight: accepted is an FCMAE with its decoder" in err


def test_benchmark_times_every_contestant():
    flags = "--model convnextv2_atto --batch_size 1 --input_size 64 --rounds 1 --device cpu --part step --json"
    command = [sys.executable, "-m", "tools.benchmark", *flags.split()]  # a process: it starts others of its kind
    report = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)
    rows = {row["contestant"]: row for row in report["models"][0]["contestants"]}
    assert {"packed", "dense masked", "dense unmasked"} <= set(rows)
    assert not any("error" in row for row in rows.values()), rows
    assert all(len(row["times_ms"]) == 1 and row["times_ms"][0] > 1 for row in rows.values())
    assert all(row["peak_mib"] > 1 for row in rows.values())


def test_benchmark_tells_mistakes_in_one_line(tool):
    for flags in ("--input_size 100", "--rounds 0", "--mask_ratio 1", "--batch_size 1 2 3"):
        status, _, err = tool("benchmark", *flags.split())
        assert status == 2 and flags.split()[0] in err.splitlines()[-1]
