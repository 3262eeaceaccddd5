"""Shared by the tests: small images, and the script run in this process as from a command line."""

import socket
import sys

import utils  # isort: skip  (before torch)
import numpy as np
import pytest
import torch
from PIL import Image

import main_finetune
import main_pretrain

torch.set_num_threads(2)


def pytest_addoption(parser):
    parser.addoption("--kills", default=3, type=int, help="SIGKILLs in tests/test_kill.py (its long form: 30)")
    parser.addoption("--terms", default=1, type=int, help="SIGTERMs there (10)")


# A model and images small enough that a step takes a tenth of a second
SMALL = "--model convnextv2_atto --decoder_embed_dim 16 --input_size 32 --stem_stride 1".split()
SMALL += "--device cpu --num_workers 0".split()
# Likewise for fine-tuning
TINY = "--model convnextv2_atto --input_size 32 --device cpu --num_workers 0".split()


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """A folder of 22 images drawn at random, in two class folders."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(22):
        path = folder / f"class{number % 2}" / f"{number:02}.png"
        path.parent.mkdir(exist_ok=True)
        coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((48, 40), Image.Resampling.BICUBIC).save(path)
    return folder


@pytest.fixture(scope="session")
def labelled_folder(tmp_path_factory):
    """train/ with 22 and val/ with 7 images drawn at random, in three class folders."""
    folder = tmp_path_factory.mktemp("labelled")
    rng = np.random.default_rng(0)
    for part, count in (("train", 22), ("val", 7)):
        for number in range(count):
            path = folder / part / ("ant", "bee", "cat")[number % 3] / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((48, 40), Image.Resampling.BICUBIC).save(path)
    return folder


@pytest.fixture
def seed_and_one_thread():
    """The same draws in every test; one thread, as tensors this small wait 10 to 100 times longer for a second one."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randomise(model):
    """The model with every parameter random, GRN, biases and norms too, such that activations stay near 1."""
    for name, p in model.named_parameters():
        vector = p.numel() == max(p.shape)  # norms, biases, GRN, mask token; the others are scaled by their fan-in
        mean = 1.0 if p.ndim == 1 and name.endswith("weight") else 0.0
        torch.nn.init.normal_(p, mean, 0.3 if vector else p[0].numel() ** -0.5)
    return model


def gap(x, reference):
    """Largest difference, relative to the reference's largest value."""
    assert x.shape == reference.shape
    return ((x - reference).abs().max() / reference.abs().max()).item()


class Result:
    def __init__(self, status, out, err):
        self.status, self.out, self.err = status, out, err


def run_here(module, flags, monkeypatch, capsys):
    """Run a training script with flags, in this process: its exit status and what it printed."""
    name = f"{module.__name__}.py"
    monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
    status = 0
    try:
        utils.run_script(module.main, utils.FlagParser(prog=name, parents=[module.get_args_parser()]))
    except SystemExit as exit:
        status = exit.code
    return Result(status, *capsys.readouterr())


@pytest.fixture
def pretrain(capsys, monkeypatch):
    """pretrain(*flags): main_pretrain.py, see `run_here`."""
    return lambda *flags: run_here(main_pretrain, flags, monkeypatch, capsys)


@pytest.fixture
def finetune(capsys, monkeypatch):
    """finetune(*flags): main_finetune.py, see `run_here`."""
    return lambda *flags: run_here(main_finetune, flags, monkeypatch, capsys)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def weights(folder, name):
    return torch.load(folder / name, weights_only=True)["model"]


def assert_same_weights(a, b):
    """Bit for bit."""
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different
