"""What every script needs: errors, flags, distributed set-up, seeds, checkpoints.

An output folder:

    output_dir/
        checkpoint-9.pth        epoch 9 is done; the --save_ckpt_num newest are kept
        checkpoint-10-400.pth   400 optimizer steps of epoch 10 are done (--save_ckpt_steps); as many are kept
        checkpoint-best.pth     of the epoch that was the best by --watch; -best-ema for the averaged weights
        encoder-best.pth        its backbone's bare weights; -best-ema likewise
        log.txt                 one JSON object an epoch
        run.lock                keeps a second run out while one writes
        events.out.tfevents.*   TensorBoard
        profile-10-20.pt.trace.json.gz (--profile_steps 10:20)
        reconstruction-0009.png (pre-training)
        confusion.png, confusion.csv, per_class.csv (fine-tuning, evaluation)
"""

import argparse
import contextlib
import ctypes
import datetime
import fcntl
import math
import os

# Read when torch is first imported, so this module comes before it: threads that spin long while they wait for each
# other make a CPU run many times slower as soon as loader workers or other programs share its cores.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# ruff: noqa: E402
import pickle
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from models.utils import use_triton

CHECKPOINT_FORMAT = 1
AMP_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


# ---------------------------------------------------------------- flags and errors


class UserError(Exception):
    """A person's mistake: told in one line saying what was given and what is accepted, exit status 2, no traceback."""


class DamagedCheckpoint(UserError):
    """A file that is not a whole checkpoint."""


class TrainingError(Exception):
    """The run cannot go on, through nobody's typing error: told in one line, exit status 1, no traceback."""


class FlagParser(argparse.ArgumentParser):
    """An `ArgumentParser` with defaults in its help, flag files (`@recipes/NAME.args`) and no abbreviated flags.

    A flag file holds flags as on the command line, on any number of lines; # begins a comment. Later flags win.
    """

    def __init__(self, *args, **kwargs):
        kwargs = {
            "formatter_class": argparse.ArgumentDefaultsHelpFormatter,
            "fromfile_prefix_chars": "@",
            "allow_abbrev": False,
        } | kwargs
        super().__init__(*args, **kwargs)

    def convert_arg_line_to_args(self, arg_line):
        return shlex.split(arg_line, comments=True)

    def error(self, message):
        """End with one line, instead of the usage of a hundred flags before it."""
        self.exit(2, f"{self.prog}: error: {message}; --help lists all flags\n")


def str2bool(text):
    """Argument type of the flags that take true or false."""
    if text.lower() in ("true", "t", "yes", "y", "1"):
        return True
    if text.lower() in ("false", "f", "no", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


class Stopped(Exception):
    """A signal ended the run.

    saved: whether the run can go on from there. requeue: the handler of submitit, if it is there.
    """

    def __init__(self, signum, saved, requeue=None):
        self.signum, self.saved, self.requeue = signum, saved, requeue


STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # what schedulers send before they take the machine
STOPPED = 75  # exit status of a run that a signal stopped and that can go on: EX_TEMPFAIL, "try again"


def run_script(main, parser):
    """Parse the command line and call main(args) as `run_main` does."""
    args = parser.parse_args()
    run_main(main, args, parser.prog)


def run_main(main, args, name):
    """Call main(args). What ends it early ends the process, in one line where no traceback helps.

    Exit status: 2 after a `UserError`, 75 after `Stopped` if the run is saved, 1 after any other error.
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may be any bytes
    try:
        main(args)
        leave_the_others()
    except KeyboardInterrupt:
        log("stopped by Ctrl-C; the same command goes on from the last checkpoint")
        sys.exit(130)
    except (UserError, TrainingError) as error:
        let_go_of_loaders(error)
        sys.stdout.flush()
        if is_main_process():
            print(f"{name}: error: {error}", file=sys.stderr)
        leave_the_others()
        sys.exit(2 if isinstance(error, UserError) else 1)
    except Stopped as stopped:
        queue_again(stopped)
        sys.exit(STOPPED if stopped.saved else 128 + stopped.signum)
    except Exception as error:
        if get_world_size() > 1:
            print(f"process {get_rank()} of {get_world_size()}, on {socket.gethostname()}, failed:", file=sys.stderr)
        let_go_of_loaders(error)
        raise
    finally:
        release_locks()


def let_go_of_loaders(error):
    """End the loader workers that the frames of a traceback hold.

    They ignore SIGTERM, with which Python would end them at exit, to wait for them then for ever.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def queue_again(stopped):
    """Leave together after a signal; in a job of submitit queue that again, on the main process, which that exits."""
    how = "saved; the same command goes on from here" if stopped.saved else "nothing was saved"
    log(f"stopped by {signal.Signals(stopped.signum).name}: {how}")
    try:
        if stopped.saved and stopped.requeue is not None:
            stopped.requeue(stopped.signum, None)
    except subprocess.CalledProcessError as error:
        if error.returncode != -signal.SIGTERM:  # Slurm may end `scontrol requeue` with the job that it queued again
            raise
    finally:
        meet()  # launchers end the other processes as soon as one has left
        leave_the_others()


def meet():
    """Wait for the other processes, if they are still there."""
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):
            dist.all_reduce(torch.zeros(1))


def leave_the_others():
    """End the process group, where all do so at the same time."""
    if dist.is_initialized():
        # A thread of gloo may still want Python's lock to free what the last exchange used. If the interpreter ends
        # first, the two wait for each other for ever (seen with torch 2.11, half of the time).
        time.sleep(0.5)
        dist.destroy_process_group()


def log(*words):
    """Print a line at once, on the main process only."""
    if is_main_process():
        print(*words, flush=True)


# ---------------------------------------------------------------- flags of model and machine


def check_least(args, least, names):
    """Raise UserError if one of these flags is given and not a finite number from `least` on."""
    for name in names.split():
        value = getattr(args, name)
        if value is not None and not least <= value < math.inf:
            raise UserError(f"--{name} {value}: must be at least {least}")


def check_part(args, names, one=True):
    """Raise UserError unless these flags are parts: from 0 to 1, or to below 1."""
    for name in names.split():
        value = getattr(args, name)
        if not 0 <= value <= 1 or value == 1 and not one:
            raise UserError(f"--{name} {value}: must be from 0 to {'1' if one else 'below 1'}")


def add_model_args(parser, models):
    """models: names to choose from."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", default="convnextv2_base", choices=list(models), metavar="NAME", help=f"one of {', '.join(models)}"
    )
    group.add_argument(
        "--input_size",
        default=224,
        type=int,
        nargs="+",
        metavar="PIXELS",
        help="side of the images, or height and width",
    )
    group.add_argument("--in_chans", default=3, type=int, help="channels of the images: 1 reads grey, 3 RGB, 4 RGBA")
    group.add_argument(
        "--stem_stride", default=4, type=int, choices=(1, 2, 4), help="pixels of a site; a mask unit is 8 times that"
    )


def image_size(args, least, multiple_of=1, flag="input_size"):
    """The flag as (height, width), or UserError."""
    given = getattr(args, flag)
    sizes = [given] if isinstance(given, int) else given
    if len(sizes) > 2 or any(size < least or size % multiple_of for size in sizes):
        what = f"multiples of {multiple_of} (8 x --stem_stride)" if multiple_of > 1 else f"numbers from {least} on"
        raise UserError(f"--{flag} {' '.join(map(str, sizes))}: must be one or two {what}")
    return sizes[0], sizes[-1]


def add_machine_args(parser, training=True):
    """training: False leaves out what nothing else than training heeds."""
    group = parser.add_argument_group("speed")
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:N or cpu")
    group.add_argument("--use_amp", default=False, type=str2bool, help="automatic mixed precision")
    group.add_argument("--amp_dtype", default="bfloat16", choices=tuple(AMP_DTYPES), help="its type")
    group.add_argument(
        "--triton",
        default=True,
        action=argparse.BooleanOptionalAction,
        help="depthwise convolutions by kernels of this project, on CUDA where Triton is installed",
    )
    if training:
        group.add_argument("--compile", action="store_true", help="torch.compile the model that is trained")
        group.add_argument(
            "--grad_checkpointing",
            action="store_true",
            help="make activations again in the backward pass: less memory, more time",
        )

    group = parser.add_argument_group("distributed (torchrun and other launchers set these)")
    group.add_argument("--world_size", default=1, type=int, help="number of processes")
    group.add_argument(
        "--local_rank", "--local-rank", default=-1, type=int, help="number of this process on its machine"
    )
    group.add_argument("--dist_on_itp", default=False, type=str2bool, help="ranks from Open MPI's environment")
    group.add_argument("--dist_url", default="env://", help="where the processes meet")
    group.add_argument(
        "--dist_timeout",
        default=1800,
        type=int,
        help="seconds after which a process that does not answer counts as dead",
    )


def check_machine_args(args):
    """Raise UserError for values that cannot work."""
    check_least(args, 1, "dist_timeout")
    check_device(args)


def check_device(args):
    try:
        device = torch.device(args.device)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {args.device}: must be cpu, cuda or cuda:N")
    gpus = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise UserError(f"--device {args.device}: {gpus or 'no'} CUDA GPU is visible; --device cpu works")


def to_device(model, args):
    """The model on its device, with the kernels that it is to run there; on the CPU the process keeps its memory."""
    use_triton(args.triton)
    if torch.device(args.device).type == "cpu":
        keep_freed_memory()
    return model.to(args.device)


def keep_freed_memory():
    """Ask glibc not to give freed memory back to the system, which takes up to a quarter of a CPU step's time.

    It would return the activations after each step, and the next would have their pages cleared and mapped again. The
    process, and loader workers that it forks, then hold as much memory as they ever needed, until they end.
    """
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    with contextlib.suppress(AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(trim_threshold, -1)  # never
        mallopt(mmap_max, 0)  # large blocks too come from what is kept


def for_training(model, args):
    """The model as it is trained: compiled, if args.compile, and its gradients averaged over processes, if several."""
    model.set_grad_checkpointing(args.grad_checkpointing)
    if args.compile:
        model = torch.compile(model)
    return torch.nn.parallel.DistributedDataParallel(model) if args.distributed else model


def loss_scaler(args):
    """What keeps float16 gradients in range; for the other types it does nothing."""
    return torch.amp.GradScaler(torch.device(args.device).type, enabled=args.use_amp and args.amp_dtype == "float16")


# ---------------------------------------------------------------- the output folder


def prepare_output(args):
    """Make the folders for what is written. Raises UserError if that fails, or if one holds another run's work."""
    if not args.output_dir:
        log("no --output_dir: neither checkpoints nor logs will be written")
    on_all_processes(lambda: make_folders(args))
    if args.output_dir and not getattr(args, "eval", False):
        on_main_process(lambda: lock_folder(args.output_dir))
        remove_half_written(args.output_dir)
    if args.output_dir and not args.auto_resume and list_checkpoints(args.output_dir):
        raise UserError(
            f"--output_dir {args.output_dir}: holds the checkpoints of a run; take another, or --auto_resume true"
        )


def make_folders(args):
    for name in ("output_dir", "log_dir"):
        folder = getattr(args, name)
        if folder:
            try:
                os.makedirs(folder, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
            except OSError as error:
                raise UserError(f"--{name} {folder}: cannot be written: {error.strerror}") from None


LOCKS = []  # open files; their locks end with them, however the process ends


def lock_folder(folder, patience=10):
    """Keep other runs from writing to a folder for as long as this process lives. Raises UserError if one does.

    patience: seconds for a run that is just ending, such as one that was killed.
    """
    path = Path(folder) / "run.lock"
    try:
        file = open(path, "a+")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    start = time.monotonic()
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > start + patience:
                file.seek(0)
                raise UserError(f"--output_dir {folder}: another run writes there: {file.read().strip()}") from None
            time.sleep(0.2)
        except OSError as error:
            return log(
                f"{folder}: this file system has no locks ({error.strerror}): see that no other run writes there"
            )
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    LOCKS.append(file)


def release_locks():
    while LOCKS:
        LOCKS.pop().close()


def log_args(args):
    for name, value in sorted(vars(args).items()):
        log(f"  {name}: {value}")
    if args.warmup_epochs >= args.epochs:
        log(f"warm-up of {args.warmup_epochs:g} epochs: the learning rate only rises, in all of {args.epochs}")


# ---------------------------------------------------------------- distributed


def get_rank():
    """The number of this process; of one that has yet to join the others, as its launcher says."""
    if dist.is_initialized():
        return dist.get_rank()
    of_srun = os.environ["SLURM_PROCID"] if is_task_of_srun() else 0
    return int(os.environ.get("RANK", of_srun))


def get_world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process():
    return get_rank() == 0


def is_task_of_srun():
    """Whether `srun` started this process beside others. A shell within `salloc` or `sbatch` is on its own."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1


def find_ranks(args):
    """(rank, number of processes, rank on this machine) as the launcher says, or None for a process on its own."""
    env = os.environ
    if args.dist_on_itp:
        if "OMPI_COMM_WORLD_RANK" not in env:
            raise UserError("--dist_on_itp true: no OMPI_COMM_WORLD_RANK in the environment; start with mpirun")
        args.dist_url = f"tcp://{env['MASTER_ADDR']}:{env['MASTER_PORT']}"
        names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
        return tuple(int(env[name]) for name in names)
    if "RANK" in env and "WORLD_SIZE" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", max(args.local_rank, 0)))
    if is_task_of_srun():
        if "MASTER_ADDR" not in env and args.dist_url == "env://":
            env["MASTER_ADDR"] = first_address_of_slurm_step()
        # a port that the steps of other jobs on the same machine do not take
        env.setdefault("MASTER_PORT", str(15000 + (64 * int(env["SLURM_JOB_ID"]) + int(env["SLURM_STEP_ID"])) % 15000))
        return tuple(int(env[name]) for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))
    return None


def first_address_of_slurm_step():
    """The address under which Slurm itself reaches the machine of the step's first task."""

    def scontrol(*words):
        return subprocess.run(["scontrol", *words], check=True, capture_output=True, text=True).stdout

    try:
        first = scontrol("show", "hostnames", os.environ["SLURM_STEP_NODELIST"]).split()[0]
        return re.search(r"NodeAddr=(\S+)", scontrol("show", "node", first))[1]
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"srun: where is process 0? {error}; set MASTER_ADDR to its address") from None


def init_distributed_mode(args):
    """Join the other processes of torchrun, torch.distributed.launch, srun or (--dist_on_itp) mpirun, if there are any.

    Sets args.distributed, args.rank, args.world_size and args.local_rank.
    """
    args.rank, args.distributed = 0, False
    ranks = find_ranks(args)
    if ranks is None:
        return
    args.rank, args.world_size, args.local_rank = ranks
    args.distributed = True
    backend = "gloo"
    if args.device.startswith("cuda"):
        backend = "cpu:gloo,cuda:nccl"  # what is on the CPU is exchanged without waiting for the GPU
        gpus = torch.cuda.device_count()
        if args.local_rank >= gpus > 1:
            raise RuntimeError(f"process {args.local_rank} of {socket.gethostname()} has no GPU: {gpus} are visible")
        index = args.local_rank % gpus  # some schedulers show each process its own only
        torch.cuda.set_device(index)
        args.device = f"cuda:{index}"
    # of 1 x 1 convolutions: their strides have two spellings, for the same order of the same numbers
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    timeout = datetime.timedelta(seconds=args.dist_timeout)
    store, rank, world_size = next(dist.rendezvous(args.dist_url, args.rank, args.world_size, timeout=timeout))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = fresh_store(store, rank, timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def fresh_store(agent_store, rank, timeout):
    """A store of this start of the processes, on process 0, whose address they find in the store of torchrun.

    torchrun's own outlives them: after a restart (--max-restarts) they would look for each other where the dead ones
    were (pytorch issue 135712). An address from before leads nowhere, and is read again.
    """
    host = os.environ["MASTER_ADDR"]
    if rank == 0:
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        agent_store.set("port of process 0", str(store.port))
        return store
    start = time.monotonic()
    while True:
        port = int(agent_store.get("port of process 0"))
        try:
            store = dist.TCPStore(host, port, timeout=datetime.timedelta(seconds=1), wait_for_workers=False)
            store.set_timeout(timeout)
            return store
        except dist.DistError:
            if time.monotonic() > start + timeout.total_seconds():
                raise
            time.sleep(0.2)


def on_all_processes(work):
    """Call work() on every process and return its result. If it fails on any of them, all raise the same UserError."""
    result = error = None
    try:
        result = work()
    except UserError as caught:
        error = str(caught)
    if dist.is_initialized():
        errors = [None] * get_world_size()
        dist.all_gather_object(errors, (error, socket.gethostname()))
        failed = [rank for rank, (error, _) in enumerate(errors) if error is not None]
        if failed:
            error, host = errors[failed[0]]
            error = error if len(failed) == len(errors) else f"process {failed[0]}, on {host}: {error}"
    if error is not None:
        raise UserError(error)
    return result


def on_main_process(work):
    """Call work() on the main process alone: all return its result. If it fails, all raise the same error."""
    outcome = [None, None]  # result, error
    if is_main_process():
        try:
            outcome = [work(), None]
        except (UserError, TrainingError) as caught:
            outcome = [None, caught]
    if dist.is_initialized():
        dist.broadcast_object_list(outcome)
    result, error = outcome
    if error is not None:
        raise error
    return result


def main_process_first(work):
    """Call work() on the main process, then on the others. If it fails there, all raise the same error."""
    results = []
    on_main_process(lambda: results.append(work()))  # None is what travels
    return results[0] if results else work()


# ---------------------------------------------------------------- randomness, a function of its key


def derive_seed(*key):
    """A 64-bit seed from non-negative integers, such as (seed, epoch, sample index): no two keys share a stream."""
    return int(np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)[0])


def set_seed(*key):
    """Make what torch, on every device, NumPy and Python draw next a function of the key alone."""
    seed = derive_seed(*key)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


# ---------------------------------------------------------------- meters


class Evaluation:
    """What a model made of every image of a data set that could be read, in the order of the set.

    loss: mean cross-entropy. targets (n,): true classes. top (n, K): likeliest classes, the likeliest first.
    topk: for which k accuracies, precisions and recalls are told; more than there are classes count as all.
    unreadable: names of the images left out.
    """

    def __init__(self, loss, targets, top, num_classes, topk=(1, 5), unreadable=()):
        self.loss, self.targets, self.top, self.unreadable = loss, targets, top, unreadable
        self.num_classes, self.topk = num_classes, topk

    @staticmethod
    def metric_names(topk):
        return ["loss", *(f"acc{k}" for k in topk), *(f"{meter}{k}" for k in topk for meter in ("precision", "recall"))]

    def accuracy(self, k):
        """Per cent of the images whose class is among the k likeliest."""
        return 100 * (self.top[:, :k] == self.targets[:, None]).any(1).double().mean().item()

    def metrics(self):
        """By name: loss, and for each k the accuracy and the means over classes of precision and recall, in per cent.

        A class that is never predicted counts with precision 0; one without images is left out of both means.
        """
        columns = self.per_class()
        present = columns["images"] > 0
        accuracies = {f"acc{k}": self.accuracy(k) for k in self.topk}
        means = {
            name: 100 * column[present].nan_to_num().mean().item()
            for name, column in columns.items()
            if name != "images"
        }
        return {"loss": self.loss} | accuracies | means

    def per_class(self):
        """By name, for each class (C,): images, and precision and recall at each k; nan where nothing is divided by.

        At k a class is predicted where it is among the k likeliest.
        """
        images = self.targets.bincount(minlength=self.num_classes)
        columns = {"images": images}
        for k in self.topk:
            top = self.top[:, :k]
            predicted = top.flatten().bincount(minlength=self.num_classes)
            right = self.targets[(top == self.targets[:, None]).any(1)].bincount(minlength=self.num_classes)
            columns |= {f"precision{k}": right.double() / predicted, f"recall{k}": right.double() / images}
        return columns

    def confusion(self):
        """(C, C) counts: row the true class, column the likeliest one."""
        pairs = self.targets * self.num_classes + self.top[:, 0]
        return pairs.bincount(minlength=self.num_classes**2).view(self.num_classes, self.num_classes)

    def __str__(self):
        top = "  ".join(f"top-{k} {self.accuracy(k):.2f} %" for k in self.topk)
        left_out = f", {len(self.unreadable)} unreadable left out" if self.unreadable else ""
        return f"{top}  loss {self.loss:.4f}  ({len(self.targets)} images{left_out})"


# ---------------------------------------------------------------- checkpoints


def write_whole(path, write):
    """Call write(file) such that `path` is at every instant the old file or the new one, whole, even if power fails."""
    path = Path(path)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the new name too
        os.close(folder)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def save_whole(path, content):
    """torch.save as by `write_whole`. Raises OSError with the path and the system's reason."""
    try:
        write_whole(path, lambda file: torch.save(content, file))
    except (OSError, RuntimeError) as error:
        # torch reports a failed write in words of its own; the system's are behind them
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(f"{path}: {getattr(reason, 'strerror', None) or reason}") from error


def remove_half_written(folder):
    """Remove what a process that was killed within `write_whole` has left."""
    if is_main_process():
        for name in ("checkpoint-*.pth", "encoder-*.pth", "log.txt"):
            for path in Path(folder).glob(f".{name}-*.tmp"):
                path.unlink(missing_ok=True)


def checkpoint_order(path):
    """(epochs done, steps done after them) from a checkpoint's name, or None for another file."""
    match = re.fullmatch(r"checkpoint-(\d+)(?:-(\d+))?\.pth", Path(path).name)
    if match is None:
        return None
    epoch, step = match.groups()
    return (int(epoch) + 1, 0) if step is None else (int(epoch), int(step))


def list_checkpoints(output_dir):
    """The checkpoints of a run, newest first."""
    paths = [path for path in Path(output_dir).glob("checkpoint-*.pth") if checkpoint_order(path)]
    return sorted(paths, key=checkpoint_order, reverse=True)


def save_model(
    args, epoch, model, model_without_ddp, optimizer, loss_scaler, model_ema=None, step=None, name=None, **progress
):
    """Write output_dir/checkpoint-EPOCH.pth, or checkpoint-EPOCH-STEP.pth within an epoch, and delete the oldest ones.

    epoch: the epoch that is done, or under way if `step` is given. progress: what else the run needs to go on.
    name: write checkpoint-NAME.pth instead, and delete none.
    Only the main process writes. Raises OSError if that fails; the earlier checkpoints are then all still there.
    """
    if not is_main_process():
        return
    folder = Path(args.output_dir)
    checkpoint = {
        "format": CHECKPOINT_FORMAT,
        "model": model_without_ddp.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": loss_scaler.state_dict(),
        "epoch": epoch + 1 if step is None else epoch,
        "step": step or 0,
        "args": dict(vars(args)),
    } | progress
    if model_ema is not None:
        checkpoint["model_ema"] = model_ema.module.state_dict()
    kept = name is not None
    name = f"checkpoint-{name if kept else epoch if step is None else f'{epoch}-{step}'}.pth"
    save_whole(folder / name, checkpoint)
    if kept:
        return
    order = checkpoint_order(name)
    older = [path for path in list_checkpoints(folder) if checkpoint_order(path) < order]
    for path in [path for path in older if (checkpoint_order(path)[1] == 0) == (step is None)][
        args.save_ckpt_num - 1 :
    ]:
        path.unlink()


def load_checkpoint(path):
    """The dict in a checkpoint file, ours or the original's. Raises UserError, DamagedCheckpoint for a part of one."""
    try:
        file = open(path, "rb")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    try:
        # The original pickles its flags as a Namespace: that one class is let through, nothing else.
        with file, torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError):
        raise DamagedCheckpoint(f"{path}: not a whole checkpoint; accepted is what torch.save wrote, uncut") from None
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path}: holds a {type(checkpoint).__name__}; accepted is a dict of weights")
    return checkpoint


def training_flags(checkpoint):
    """The flags of the run that wrote a checkpoint, as far as it has them."""
    flags = checkpoint.get("args") or {}
    return flags if isinstance(flags, dict) else vars(flags)


def newest_checkpoint(output_dir):
    """The newest whole checkpoint of a run and its path, or (None, None) if the folder has none.

    Damaged ones are named and passed over. Raises UserError if all are, or if one is not of this project.
    """
    paths = list_checkpoints(output_dir)
    for path in paths:
        try:
            checkpoint = load_checkpoint(path)
        except DamagedCheckpoint as error:
            log(f"{error}. Passed over.")
            continue
        if "format" not in checkpoint:
            raise UserError(f"{path}: not of this project: give it as --resume, with another --output_dir")
        return checkpoint, path
    if paths:
        raise UserError(f"{output_dir}: none of its {len(paths)} checkpoints is whole; move them away to start anew")
    return None, None
