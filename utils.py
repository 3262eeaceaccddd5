"""What every script needs: errors and the script's frame, ranks and collectives, the device, seeds."""

import contextlib
import ctypes
import datetime
import os

# Read when torch is first imported, so this module comes before it: threads that spin long while they wait for each
# other make a CPU run many times slower as soon as loader workers or other programs share its cores. With hardly any
# spinning (1000) a training step on an idle machine takes a fifth longer.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# ruff: noqa: E402
import multiprocessing
import random
import re
import signal
import socket
import subprocess
import sys
import time
import warnings

import numpy as np
import torch
import torch.distributed as dist

from models import triton_switch

# ---------------------------------------------------------------- errors and the script's frame


class OneLineError(Exception):
    """Of one line, whatever it quotes."""

    def __init__(self, message):
        super().__init__(" ".join(str(message).splitlines()))


class UserError(OneLineError):
    """A mistake of the user: reported in one line that names what was given and what is accepted."""

    status = 2  # of the exit


class TrainingError(OneLineError):
    """The run cannot continue, and no flag was wrong: reported in one line."""

    status = 1


class Stopped(BaseException):
    """A signal ended the run; only the script's frame catches this.

    saved: whether it can resume. requeue: the signal handler of submitit, or None. alone: without the other ranks.
    """

    def __init__(self, signum, saved, requeue=None, alone=False):
        self.signum, self.saved, self.requeue, self.alone = signum, saved, requeue, alone

    @property
    def status(self):
        """75 if a scheduler sent the signal and the run is saved, else 128 + its number."""
        by_person = self.signum in (signal.SIGINT, signal.SIGHUP)
        return 128 + self.signum if by_person or not self.saved else STOPPED


# Ctrl-C, the end of a terminal, and what schedulers send before they take the machine
STOP_SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
STOPPED = 75  # exit status of a run that a scheduler stopped and that can resume: EX_TEMPFAIL, "try again"


@contextlib.contextmanager
def name_in_errors(prefix):
    """Turn a ValueError, as models/ raises for weights that do not fit, into a UserError that starts with `prefix`."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{prefix}: {error}") from None


def run_main(main, args, name):
    """Call main(args) and translate what ends it early into one line and an exit status.

    Status: that of `UserError`, `TrainingError` or `Stopped`; 1 after any other error.
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may be any bytes
    try:
        try:
            main(args)
        finally:
            shutdown_workers()  # which something may still hold, or one of which may be stalled
        leave_process_group()
    except KeyboardInterrupt:
        log("stopped by Ctrl-C at once; nothing more was saved")
        sys.exit(130)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at exit
        sys.exit(128 + signal.SIGPIPE)
    except OneLineError as error:
        sys.stdout.flush()
        report(name, error)
        leave_process_group()
        sys.exit(error.status)
    except Stopped as stopped:
        requeue(stopped)
        sys.exit(stopped.status)
    except Exception:
        if get_world_size() > 1:
            print(f"rank {get_rank()} of {get_world_size()}, on {socket.gethostname()}, failed:", file=sys.stderr)
        raise


def report(name, error):
    """Print an error in one line: on the main rank, and on another one if the main rank does not fail alike."""
    place = ""
    if is_main_process():
        if dist.is_initialized():
            STORE[0].set("error of rank 0", str(error))
    elif not dist.is_initialized():
        return  # of the flags, which are the same on every rank
    else:
        with contextlib.suppress(dist.DistError, RuntimeError):
            STORE[0].wait(["error of rank 0"], datetime.timedelta(seconds=5))
            if STORE[0].get("error of rank 0").decode() == str(error):
                return
        place = f"rank {get_rank()}, on {socket.gethostname()}: "
    print(f"{name}: error: {place}{error}", file=sys.stderr)


STORE = []  # through which the ranks found each other


def shutdown_workers():
    """Kill the loader workers: they ignore SIGTERM, which Python sends at exit before it waits for them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report them as failed
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()


def requeue(stopped):
    """Leave the process group after a signal; in a job of submitit the main process queues the job again first."""
    outcome = "saved; the same command resumes from here" if stopped.saved else "nothing was saved"
    log(f"stopped by {signal.Signals(stopped.signum).name}: {outcome}")
    try:
        if stopped.saved and stopped.requeue is not None:
            stopped.requeue(stopped.signum, None)
    except subprocess.CalledProcessError as error:
        if error.returncode != -signal.SIGTERM:  # Slurm may kill `scontrol requeue` together with the job it requeued
            raise
    finally:
        if stopped.alone:  # the others may wait for this rank: it cannot wait for them
            sys.stdout.flush()
            os._exit(stopped.status)
        barrier()  # launchers kill the other ranks as soon as one has left
        leave_process_group()


def format_count(count, noun):
    """1 class, 2 classes, 3 images."""
    return f"{count} {noun}" + ("" if count == 1 else "es" if noun.endswith("s") else "s")


def log(*words):
    """Print a line at once, on the main process only. A closed terminal or a full disk behind it stops no run."""
    if is_main_process():
        with contextlib.suppress(OSError):
            print(*words, flush=True)


# ---------------------------------------------------------------- ranks and collectives


def get_rank():
    """The rank of this process; before the process group exists, as its launcher says."""
    if dist.is_initialized():
        return dist.get_rank()
    rank_in_step = os.environ["SLURM_PROCID"] if is_srun_task() else 0
    return int(os.environ.get("RANK", rank_in_step))


def get_world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process():
    return get_rank() == 0


def is_srun_task():
    """Whether `srun` started this process beside others. A shell within `salloc` or `sbatch` is on its own."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1


def find_launcher(args):
    """(rank, world size, local rank, rendezvous URL) as the launcher says, or None for a process on its own."""
    env = os.environ
    if args.dist_on_itp:
        if "OMPI_COMM_WORLD_RANK" not in env:
            raise UserError("--dist_on_itp true: no OMPI_COMM_WORLD_RANK in the environment; start with mpirun")
        ranks = (int(env[f"OMPI_COMM_WORLD_{name}"]) for name in ("RANK", "SIZE", "LOCAL_RANK"))
        return *ranks, f"tcp://{env['MASTER_ADDR']}:{env['MASTER_PORT']}"
    if "RANK" in env and "WORLD_SIZE" in env:
        local_rank = int(env.get("LOCAL_RANK", max(args.local_rank, 0)))
        return int(env["RANK"]), int(env["WORLD_SIZE"]), local_rank, args.dist_url
    if is_srun_task():
        if "MASTER_ADDR" not in env and args.dist_url == "env://":
            env["MASTER_ADDR"] = find_first_node()
        # a port that the steps of other jobs on the same machine do not take
        env.setdefault("MASTER_PORT", str(15000 + (64 * int(env["SLURM_JOB_ID"]) + int(env["SLURM_STEP_ID"])) % 15000))
        return *(int(env[f"SLURM_{name}"]) for name in ("PROCID", "STEP_NUM_TASKS", "LOCALID")), args.dist_url
    if args.world_size > 1 or args.local_rank > 0:
        flags = f"--world_size {args.world_size} --local_rank {args.local_rank}"
        raise UserError(f"{flags}: no launcher started this process; use torchrun --nproc_per_node=N, srun or mpirun")
    return None


def find_first_node():
    """The address under which Slurm itself reaches the node of the step's first task."""
    command = ["scontrol", "show", "node", os.environ["SLURM_STEP_NODELIST"]]
    try:
        nodes = subprocess.run(command, check=True, capture_output=True, text=True).stdout  # in their order
        return re.search(r"NodeAddr=(\S+)", nodes)[1]
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"srun: cannot find the node of rank 0: {error}; set MASTER_ADDR to its address") from None


def init_distributed_mode(args):
    """Join the other processes of torchrun, torch.distributed.launch, srun or (--dist_on_itp) mpirun, if there are any.

    Returns the device of this process.
    """
    launcher = find_launcher(args)
    device, backend = torch.device(args.device), "gloo"
    if launcher is None:
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # also what the memory is reported of
        return device
    rank, world_size, local_rank, url = launcher
    if device.type == "cuda":
        backend = "cpu:gloo,cuda:nccl"  # tensors on the CPU are exchanged without waiting for the GPU
        gpus = torch.cuda.device_count()
        if local_rank >= gpus > 1:
            raise RuntimeError(f"local rank {local_rank} on {socket.gethostname()} has no GPU: {gpus} are visible")
        device = torch.device("cuda", local_rank % gpus)  # some schedulers show each process only its own GPU
        torch.cuda.set_device(device)
    # the strides of 1x1 kernels are ambiguous; the warning is harmless
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    timeout = datetime.timedelta(seconds=args.dist_timeout)
    store, rank, world_size = next(dist.rendezvous(url, rank, world_size, timeout=timeout))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = create_store(store, rank, timeout)
    STORE[:] = [store]
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    return device


def create_store(agent_store, rank, timeout):
    """A store of this start of the processes, hosted by rank 0; the others find its port in torchrun's store.

    torchrun's own store outlives the processes: after a restart (--max-restarts) they would look for each other where
    the dead ones were (pytorch issue 135712). A port of an earlier start leads nowhere, and is read again.
    """
    host = os.environ["MASTER_ADDR"]
    if rank == 0:
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        agent_store.set("port of rank 0", str(store.port))
        return store
    start = time.monotonic()
    while True:
        port = int(agent_store.get("port of rank 0"))
        try:
            store = dist.TCPStore(host, port, timeout=datetime.timedelta(seconds=1), wait_for_workers=False)
            store.set_timeout(timeout)
            return store
        except dist.DistError:
            if time.monotonic() > start + timeout.total_seconds():
                raise
            time.sleep(0.2)


def leave_process_group():
    """Destroy the process group; all ranks call this at the same time."""
    if dist.is_initialized():
        # A thread of gloo may still need the GIL to free what the last exchange used. If the interpreter ends first,
        # the two wait for each other for ever (seen with torch 2.11, half of the time).
        time.sleep(0.5)
        dist.destroy_process_group()


def barrier():
    """Wait for the other ranks, as far as they are still alive."""
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):
            dist.all_reduce(torch.zeros(1))


def all_gather(value):
    """A list with the picklable value of each rank."""
    values = [value] * get_world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def gather_to_main(value):
    """A list with the picklable value of each rank on the main rank, an empty one on the others."""
    values = [value] * get_world_size() if is_main_process() else None
    if dist.is_initialized():
        dist.gather_object(value, values)
    return values or []


def on_all_ranks(work):
    """Call work() on every rank and return its result. If it raises UserError on any, all raise the same one."""
    result = problem = None
    try:
        result = work()
    except UserError as error:
        problem = str(error), f"rank {get_rank()}, on {socket.gethostname()}"
    problems = all_gather(problem)
    for message, place in filter(None, problems):  # the first
        raise UserError(message if all(problems) else f"{place}: {message}")
    return result


def on_main_rank(work):
    """Call work() on the main rank alone: all return its result. If it fails there, all raise the same error."""
    outcome = [None, None]  # result, error
    if is_main_process():
        try:
            outcome[0] = work()
        except OneLineError as error:
            outcome[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def main_rank_first(work):
    """Call work() on the main rank, then on the others. If it fails there, all raise the same error."""
    results = []
    on_main_rank(lambda: results.append(work()))  # broadcasts None: the result may not pickle
    return results[0] if results else work()


# ---------------------------------------------------------------- device and precision


def to_device(model, device, triton=True):
    """The model on its device, with the settings and kernels of every training there, the same on every rank."""
    device = torch.device(device)
    if device.type == "cpu":
        keep_freed_memory()
    else:
        configure_cuda()
        reasons = all_gather(triton_switch.triton_works(device) if triton else "--no-triton")
        reason = next(filter(None, reasons), None)
        triton_switch.use_triton(reason is None)
        if triton and reason:
            log(f"Triton kernels are off, plain PyTorch runs instead, with many times their traffic: {reason}")
    return model.to(device)


def configure_cuda():
    """TF32 for float32, which is 10 times as fast as without; and the same algorithms in every run.

    cuDNN, which computes few layers here, is asked for deterministic ones, and not to choose by timing: a run that is
    resumed could choose others.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True


def keep_freed_memory():
    """Ask glibc not to return freed memory to the system, which takes up to a quarter of a CPU step's time.

    It would return the activations after each step, and the next step would have their pages cleared and mapped again.
    The process, and loader workers that it forks, then hold as much memory as they ever needed, until they end.
    """
    with contextlib.suppress(AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks too come from what is kept


def autocast(args, device):
    """A context in which the forward pass computes in --amp_dtype where that is safe, with --use_amp."""
    return torch.autocast(device.type, getattr(torch, args.amp_dtype), enabled=args.use_amp)


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
