"""What every script needs: flags and errors, distributed set-up, seeds, the learning rate, checkpoints.

An output folder:

    output_dir/
        checkpoint-9.pth        epoch 9 is done; the --save_ckpt_num newest are kept
        checkpoint-10-400.pth   400 optimizer steps of epoch 10 are done (--save_ckpt_steps); as many are kept
        log.txt                 one JSON object an epoch
        events.out.tfevents.*   TensorBoard
        reconstruction-0009.png
"""

import argparse
import math
import os

# Read when torch is first imported, so this module comes before it: threads that spin long while they wait for each
# other make a CPU run many times slower as soon as loader workers or other programs share its cores.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# ruff: noqa: E402
import pickle
import re
import shlex
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

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


def str2bool(text):
    """Argument type of the flags that take true or false."""
    if text.lower() in ("true", "t", "yes", "y", "1"):
        return True
    if text.lower() in ("false", "f", "no", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def run_script(main, parser):
    """Parse the command line and call main(args); `UserError` ends the process with status 2, the rest with 1."""
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may be any bytes
    try:
        main(args)
    except KeyboardInterrupt:
        log("stopped by Ctrl-C; the same command goes on from the last checkpoint")
        sys.exit(130)
    except (UserError, TrainingError) as error:
        sys.stdout.flush()
        if is_main_process():
            print(f"{parser.prog}: error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def log(*words):
    """Print a line at once, on the main process only."""
    if is_main_process():
        print(*words, flush=True)


# ---------------------------------------------------------------- distributed


def get_rank():
    """The number of this process; of one that has yet to join the others, as its launcher says."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def get_world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process():
    return get_rank() == 0


def init_distributed_mode(args):
    """Join the other processes of torchrun, torch.distributed.launch or (--dist_on_itp) Open MPI, if there are any.

    Sets args.distributed, args.rank, args.world_size and args.local_rank.
    """
    env = os.environ
    args.rank, args.distributed = 0, False
    if args.dist_on_itp:
        if "OMPI_COMM_WORLD_RANK" not in env:
            raise UserError("--dist_on_itp true: no OMPI_COMM_WORLD_RANK in the environment; start with mpirun")
        args.rank, args.world_size = int(env["OMPI_COMM_WORLD_RANK"]), int(env["OMPI_COMM_WORLD_SIZE"])
        args.local_rank = int(env["OMPI_COMM_WORLD_LOCAL_RANK"])
        args.dist_url = f"tcp://{env['MASTER_ADDR']}:{env['MASTER_PORT']}"
    elif "RANK" in env and "WORLD_SIZE" in env:
        args.rank, args.world_size = int(env["RANK"]), int(env["WORLD_SIZE"])
        args.local_rank = int(env.get("LOCAL_RANK", max(args.local_rank, 0)))
    else:
        return
    args.distributed = True
    backend = "gloo"
    if args.device.startswith("cuda"):
        backend = "nccl"
        torch.cuda.set_device(args.local_rank)
        args.device = f"cuda:{args.local_rank}"
    dist.init_process_group(backend, init_method=args.dist_url, world_size=args.world_size, rank=args.rank)


# ---------------------------------------------------------------- randomness, a function of its key


def derive_seed(*key):
    """A 64-bit seed from non-negative integers, such as (seed, epoch, sample index): no two keys share a stream."""
    return int(np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)[0])


# ---------------------------------------------------------------- learning rate


def adjust_learning_rate(optimizer, epoch, args):
    """Set and return the learning rate at a point in training: linear warm-up, then half a cosine down to args.min_lr.

    epoch: epochs done, with a fraction. Parameter groups with an `lr_scale` get that part of it.
    """
    if epoch < args.warmup_epochs:
        lr = args.lr * epoch / args.warmup_epochs
    else:
        progress = (epoch - args.warmup_epochs) / (args.epochs - args.warmup_epochs)
        lr = args.min_lr + (args.lr - args.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr


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


def remove_half_written(folder):
    """Remove what a process that was killed within `write_whole` has left."""
    if is_main_process():
        for name in ("checkpoint-*.pth", "log.txt"):
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


def save_model(args, epoch, model, model_without_ddp, optimizer, loss_scaler, model_ema=None, step=None, **progress):
    """Write output_dir/checkpoint-EPOCH.pth, or checkpoint-EPOCH-STEP.pth within an epoch, and delete the oldest ones.

    epoch: the epoch that is done, or under way if `step` is given. progress: what else the run needs to go on.
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
        checkpoint["model_ema"] = model_ema.state_dict()
    name = f"checkpoint-{epoch}.pth" if step is None else f"checkpoint-{epoch}-{step}.pth"
    try:
        write_whole(folder / name, lambda file: torch.save(checkpoint, file))
    except (OSError, RuntimeError) as error:
        # torch reports a failed write in words of its own; the system's are behind them
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(f"{folder / name}: {getattr(reason, 'strerror', None) or reason}") from error
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


def get_weights(checkpoint, path):
    """The weights in a checkpoint, ours or of the original's Minkowski training, with this project's names and shapes.

    Raises UserError if there are none.
    """
    state = checkpoint.get("model", checkpoint)
    if not isinstance(state, dict) or not all(isinstance(k, str) and torch.is_tensor(v) for k, v in state.items()):
        raise UserError(f"{path}: holds no weights; accepted is a dict of tensors by name, or one under 'model'")
    return remap_checkpoint_keys(state)


def load_weights(model, checkpoint, path):
    """Load the weights of a checkpoint. Raises UserError, with a difference of each kind, if it is of another model."""
    state = get_weights(checkpoint, path)
    own = model.state_dict()
    differences = [
        [f"{name} is missing" for name in own if name not in state],
        [f"{name} is not of this model" for name in state if name not in own],
        [
            f"{name} is {tuple(state[name].shape)}, not {tuple(value.shape)}"
            for name, value in own.items()
            if name in state and state[name].shape != value.shape
        ],
    ]
    if any(differences):
        examples = "; ".join(kind[0] for kind in differences if kind)
        count = sum(map(len, differences))
        raise UserError(f"{path}: a checkpoint of another model: {count} differences, such as {examples}")
    model.load_state_dict(state)


def remap_checkpoint_keys(state):
    """A state dict of the original's Minkowski training with this project's names and shapes, those of the dense code.

    `kernel` (kh * kw, in, out), or (kh * kw, C) if depthwise, the first axis of space running fastest, becomes
    `weight` (out, in, kh, kw) or (C, 1, kh, kw); biases (1, C) become (C,); `.ln.` and `.linear.` go; GRN (1, 4C)
    becomes (1, 1, 1, 4C). Entries that have the dense form already stay as they are.
    """
    remapped = {}
    for name, value in state.items():
        name = name.replace(".ln.", ".").replace(".linear.", ".")
        if name.endswith(".kernel"):
            name = name.removesuffix("kernel") + "weight"
            side = round(len(value) ** 0.5)
            value = value.view(side, side, *((1,) if value.ndim == 2 else ()), *value.shape[1:])
            value = value.permute(3, 2, 1, 0).contiguous()
        elif name.endswith((".grn.gamma", ".grn.beta")):
            value = value.reshape(1, 1, 1, -1)
        elif name.endswith(".bias"):
            value = value.flatten()
        remapped[name] = value
    return remapped
