"""Shared by the tests: small images, and the script run in this process as from a command line."""

import functools
import importlib
import io
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading

import utils  # isort: skip  (before torch)
import numpy as np
import pytest
import torch
from PIL import Image

import checkpoints
import main_finetune
import main_pretrain
from flags import FlagParser, run_script
from models import convnextv2, fcmae

torch.set_num_threads(1)  # several processes test at a time, see Makefile
SLOWEST = "submitit distributed kernels hooks models kill main_finetune gpu faults main_pretrain tools interop".split()
SLOWEST = [f"test_{name}" for name in SLOWEST]


def pytest_collection_modifyitems(items):
    """The slowest files first, so that all processes end at about the same time."""
    items.sort(key=lambda item: (SLOWEST + [item.path.stem]).index(item.path.stem))


def pytest_addoption(parser):
    parser.addoption("--kills", default=3, type=int, help="SIGKILLs in tests/test_kill.py (its long form: 30)")
    parser.addoption(
        "--rounds",
        default=1,
        type=int,
        help="tries in tests/test_faults.py (its long form: 10); above 1 both scripts on Slurm",
    )
    parser.addoption("--terms", default=1, type=int, help="SIGTERMs there (10)")


# A model and images small enough that a step takes a tenth of a second
SMALL = "--model convnextv2_atto --decoder_embed_dim 16 --input_size 32 --stem_stride 1".split()
SMALL += "--device cpu --num_workers 0".split()
# Likewise for fine-tuning
TINY = "--model convnextv2_atto --input_size 32 --device cpu --num_workers 0".split()


def draw_images(folder, count, classes, size, seed=0):
    """So many images drawn at random, in turn in the folder of each class."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        path = folder / classes[number % len(classes)] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """A folder of 22 images in two class folders."""
    folder = tmp_path_factory.mktemp("images")
    draw_images(folder, 22, ("class0", "class1"), (48, 40))
    return folder


@pytest.fixture
def narrow():
    """Put fewer blocks and channels into both convnextv2_atto, for runs whose size does not matter."""
    size = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convnextv2, "convnextv2_atto", functools.partial(convnextv2.ConvNeXtV2, **size))
        patch.setattr(fcmae, "convnextv2_atto", functools.partial(fcmae.FCMAE, **size))
        yield


@pytest.fixture
def small(image_folder, narrow):
    """5 steps an epoch: 22 images in batches of 4."""
    return [*SMALL, "--data_path", image_folder, "--batch_size", 4, "--warmup_epochs", 1, "--epochs", 2]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder for runs that several tests of a file look at."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="session")
def labelled_folder(tmp_path_factory):
    """train/ with 22 and val/ with 7 images in three class folders."""
    folder = tmp_path_factory.mktemp("labelled")
    draw_images(folder / "train", 22, ("ant", "bee", "cat"), (48, 40), seed=0)
    draw_images(folder / "val", 7, ("ant", "bee", "cat"), (48, 40), seed=1)
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


def release_locks():
    """As the end of a process does."""
    while checkpoints.LOCKS:
        checkpoints.LOCKS.pop().release()


def run_here(run, command, monkeypatch, capsys):
    """Call run() in this process with that command line: its exit status and what it printed."""
    monkeypatch.setattr(sys, "argv", [*map(str, command)])
    handlers = {signum: signal.getsignal(signum) for signum in utils.STOP_SIGNALS}
    status = 0
    try:
        run()
    except SystemExit as exit:
        status = exit.code
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    release_locks()
    return Result(status, *capsys.readouterr())


def run_script_here(module, flags, monkeypatch, capsys):
    """Run a training script with flags, in this process, see `run_here`."""
    parser = FlagParser(prog=f"{module.__name__}.py", parents=[module.get_args_parser()])

    def run():
        utils.run_main(module.main, parser.parse_args(), parser.prog)

    return run_here(run, [parser.prog, *flags], monkeypatch, capsys)


@pytest.fixture
def pretrain(capsys, monkeypatch):
    """pretrain(*flags): main_pretrain.py, see `run_script_here`."""
    return lambda *flags: run_script_here(main_pretrain, flags, monkeypatch, capsys)


@pytest.fixture
def finetune(capsys, monkeypatch):
    """finetune(*flags): main_finetune.py, see `run_script_here`."""
    return lambda *flags: run_script_here(main_finetune, flags, monkeypatch, capsys)


# What a script imports as it runs, in three seconds
IMPORTED_LATER = (
    "torch._dynamo torch.utils.tensorboard torchvision.transforms.v2 timm.data timm.optim timm.utils".split()
)


class Fork:
    """A script with flags in a process of its own, as a `subprocess.Popen`, but forked, as importing takes seconds."""

    def __init__(self, module, flags, **environment):
        for name in IMPORTED_LATER:
            importlib.import_module(name)
        reader, writer = os.pipe()
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=run_as_script, args=(module, flags, environment, writer))
        self.process.start()
        os.close(writer)
        self.stdout, self.pid = open(reader), self.process.pid

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def wait(self):
        self.process.join()
        return self.returncode

    def send_signal(self, signum):
        os.kill(self.pid, signum)

    def kill(self):
        self.process.kill()

    def communicate(self, timeout=120):
        """The rest of what it prints, and None; killed if it has not ended after so many seconds."""
        timer = threading.Timer(timeout, self.kill)
        timer.start()
        out = self.stdout.read()
        self.wait()
        timer.cancel()
        return out, None


def run_as_script(module, flags, environment, writer):
    """In a child: run a script, in a session of its own; what it prints goes to a pipe."""
    os.setsid()
    os.environ.update({name: str(value) for name, value in environment.items()})
    for number in (1, 2):
        os.dup2(writer, number)
    sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb"), line_buffering=True)
    sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb"), line_buffering=True)
    sys.argv = [f"{module.__name__}.py", *map(str, flags)]
    run_script(module.main, module.get_args_parser(), module.__doc__)


def end(process, seconds=120):
    """Exit status and the rest of the output of a process that ends by itself."""
    try:
        out, _ = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, out


def finish(process):
    """Its output, once it has ended well."""
    status, out = end(process)
    assert status == 0, out
    return out


def start_ranks(module, *flags, ranks=2, second=()):
    """A script in forks, as a launcher starts it that does not watch them; second: more flags of that rank."""
    job = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), WORLD_SIZE=ranks)
    more = {1: second}
    return [Fork(module, [*flags, *more.get(rank, ())], RANK=rank, LOCAL_RANK=rank, **job) for rank in range(ranks)]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def weights(folder, name):
    return torch.load(folder / name, weights_only=True)["model"]


def log_lines(folder):
    """log.txt without the one number that is of the machine and not of the run."""
    lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    for line in lines:
        line.pop("images_per_second", None)
    return lines


def assert_same_weights(a, b):
    """Bit for bit."""
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different
