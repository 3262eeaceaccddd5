"""The files of a run: the output folder, its lock, checkpoints written whole and read safely, and how a run resumes.

    output_dir/
        checkpoint-9.pth        epoch 9 is done; the --save_ckpt_num newest are kept
        checkpoint-10-400.pth   400 optimizer steps of epoch 10 are done (--save_ckpt_steps); as many are kept
        checkpoint-best.pth     the best epoch by --watch; checkpoint-best-ema.pth by the EMA weights
        encoder-best.pth        the weights of its encoder alone; encoder-best-ema.pth likewise
        run.lock                held while a run writes here
        log.txt                 one JSON object an epoch
        events.out.tfevents.*   TensorBoard
        profile-10-20.pt.trace.json.gz (--profile_steps 10:20)
        reconstruction-0009.png (pre-training)
        confusion.png, confusion.csv, per_class.csv (fine-tuning, evaluation)

A checkpoint is a dict, readable by `torch.load(path, weights_only=True)`:

    format                  2
    model, model_ema        weights; the EMA weights with --model_ema
    config                  constructor arguments of the model: `FCMAE(**config)`, `ConvNeXtV2(**config)`
    optimizer, scaler       state dicts
    epoch, step             where to resume: epochs done, and optimizer steps done after them
    args                    the flags
    ...                     `Run.state_dict()`: losses of the epoch so far, best values, names of classes, hooks' states
"""

import argparse
import os
import pickle
import re
import socket
import tempfile
import zipfile
from pathlib import Path

import torch

import utils
from flags import Switch, at_least
from models import files
from models.weights import check_same_blocks, find_weights, load_weights, remap_checkpoint_keys
from utils import UserError, log

CHECKPOINT_FORMAT = 2


class DamagedCheckpoint(UserError):
    """A file that is not a whole checkpoint."""


def add_output_args(parser):
    add = parser.add_argument_group("checkpoints").add_argument
    add("--output_dir", default="", metavar="FOLDER", help="folder of all output; empty: write nothing")
    add("--save_ckpt", default=True, action=Switch, help="write checkpoints")
    add("--save_ckpt_freq", default=1, type=at_least(1), help="epochs between two checkpoints")
    add("--save_ckpt_steps", default=0, type=at_least(0), help="steps between checkpoints within an epoch; 0: none")
    add("--save_ckpt_num", default=3, type=at_least(1), help="newest checkpoints to keep, of each kind")
    add("--auto_resume", default=True, action=Switch, help="resume from the newest checkpoint in --output_dir")
    add("--resume", default="", metavar="FILE", help="checkpoint to resume from while --output_dir has none")


# ---------------------------------------------------------------- the output folder

LOCKS = []  # held as long as this process lives; forked loader workers do not inherit them


def prepare_output(args, evaluating=False):
    """Create the folders of a run. Raises UserError if that fails, or if one holds the work of another run."""
    if not args.output_dir:
        log("no --output_dir: neither checkpoints nor logs will be written")
    utils.on_all_ranks(lambda: make_folders(args))
    if args.output_dir and not evaluating:
        utils.on_main_rank(lambda: lock_folder(args.output_dir))
        if utils.is_main_process():
            remove_half_written(args.output_dir)
    if args.output_dir and not args.auto_resume and list_checkpoints(args.output_dir):
        raise UserError(
            f"--output_dir {args.output_dir}: holds the checkpoints of a run; choose another, or --auto_resume true"
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


def lock_folder(folder, timeout=10):
    """Keep other runs from writing to a folder for as long as this process lives. Raises UserError if one does.

    timeout: seconds to wait for a run that is just ending, such as one that was killed.
    """
    import filelock

    path = Path(folder) / "run.lock"
    lock = filelock.FileLock(path, timeout=timeout)
    try:
        lock.acquire()
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    except filelock.Timeout:
        raise UserError(f"--output_dir {folder}: another run writes there: {path.read_text().strip()}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    LOCKS.append(lock)


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
    check_loadable(content, Path(path).name)
    try:
        write_whole(path, lambda file: torch.save(content, file))
    except (OSError, RuntimeError) as error:
        # torch reports a failed write in words of its own; the system's reason is its context
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(f"{path}: {getattr(reason, 'strerror', None) or reason}") from error


def check_loadable(content, name):
    """Raise TypeError, naming the entry, for what `weights_only` refuses to load, such as NumPy scalars."""
    if isinstance(content, dict | list | tuple):
        items = content.items() if isinstance(content, dict) else enumerate(content)
        for key, value in items:
            check_loadable(value, f"{name}[{key!r}]")
    elif not torch.is_tensor(content) and type(content) not in (bool, int, float, str, bytes, type(None)):
        raise TypeError(f"{name} is a {type(content).__name__}: must be a tensor, number, string, list or dict")


def remove_half_written(folder):
    """Remove what a process that was killed within `write_whole` left behind."""
    for name in ("checkpoint-*.pth", "encoder-*.pth", "log.txt"):
        for path in Path(folder).glob(f".{name}-*.tmp"):
            path.unlink(missing_ok=True)


# ---------------------------------------------------------------- writing


def checkpoint_position(path):
    """(epochs done, steps done after them) from a checkpoint's name, or None for another file."""
    match = re.fullmatch(r"checkpoint-(\d+)(?:-(\d+))?\.pth", Path(path).name)
    if match is None:
        return None
    epoch, step = match.groups()
    return (int(epoch) + 1, 0) if step is None else (int(epoch), int(step))


def list_checkpoints(output_dir):
    """The checkpoints of a run, newest first."""
    paths = [path for path in Path(output_dir).glob("checkpoint-*.pth") if checkpoint_position(path)]
    return sorted(paths, key=checkpoint_position, reverse=True)


def save_model(
    args, epoch, model, model_without_ddp, optimizer, loss_scaler, model_ema=None, step=None, name=None, **run_state
):
    """Write output_dir/checkpoint-EPOCH.pth, or checkpoint-EPOCH-STEP.pth within an epoch, and delete the oldest ones.

    epoch: the epoch that is done, or in progress if `step` is given. run_state: `Run.state_dict()`. name: write
    checkpoint-NAME.pth instead, and delete none. Only the main process writes. Raises OSError if that fails; the
    earlier checkpoints are then all still there.
    """
    if not utils.is_main_process():
        return
    checkpoint = {
        "format": CHECKPOINT_FORMAT,
        "model": model_without_ddp.state_dict(),
        "config": model_without_ddp.config,
        "optimizer": optimizer.state_dict(),
        "scaler": loss_scaler.state_dict(),
        "epoch": epoch + 1 if step is None else epoch,
        "step": step or 0,
        "args": dict(vars(args)),
    }
    if model_ema is not None:
        checkpoint["model_ema"] = model_ema.module.state_dict()
    stem = name or (f"{epoch}" if step is None else f"{epoch}-{step}")
    path = Path(args.output_dir) / f"checkpoint-{stem}.pth"
    save_whole(path, checkpoint | run_state)
    if name is None:
        delete_older(path, keep=args.save_ckpt_num)


def delete_older(path, keep):
    """Delete the checkpoints before `path` of its kind (end of an epoch or within), except the newest keep - 1."""
    position = checkpoint_position(path)
    older = [other for other in list_checkpoints(path.parent) if checkpoint_position(other) < position]
    same_kind = [other for other in older if (checkpoint_position(other)[1] == 0) == (position[1] == 0)]
    for other in same_kind[keep - 1 :]:
        other.unlink()


utils.save_model = save_model  # where the original has it


# ---------------------------------------------------------------- reading


def load_checkpoint(path):
    """The dict in a checkpoint file of any known form; its tensors stay on disk until they are read.

    Raises UserError, or DamagedCheckpoint for a file that was cut short.
    """
    if not files.is_torch_file(path):
        with utils.name_in_errors(path):
            return files.read_other_file(path)
    try:
        open(path, "rb").close()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    try:
        # The original pickles its flags as a Namespace: that one class is allowed, nothing else.
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError):
        raise DamagedCheckpoint(f"{path}: not a whole checkpoint; must be a file of torch.save, uncut") from None
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path}: holds a {type(checkpoint).__name__}; must hold a dict of weights")
    return checkpoint


def newest_checkpoint(output_dir):
    """The newest whole checkpoint of a run and its path, or (None, None) if the folder has none.

    Damaged ones are named and skipped. Raises UserError if all are, or if one is not of this project.
    """
    paths = list_checkpoints(output_dir) if output_dir else []
    for path in paths:
        try:
            checkpoint = load_checkpoint(path)
        except DamagedCheckpoint as error:
            log(f"{error}. Skipped.")
            continue
        if "format" not in checkpoint:
            raise UserError(f"{path}: not of this project: give it as --resume, with another --output_dir")
        return checkpoint, path
    if paths:
        raise UserError(f"{output_dir}: none of its {len(paths)} checkpoints is whole; move them away to start anew")
    return None, None


def find_checkpoint(args):
    """The checkpoint to resume from and its path: the newest in --output_dir, else --resume, else (None, None)."""
    checkpoint, path = newest_checkpoint(args.output_dir)
    if checkpoint is None and args.resume:
        checkpoint, path = load_checkpoint(args.resume), args.resume
    return checkpoint, path


def training_flags(checkpoint):
    """The flags of the run that wrote a checkpoint, as far as it has them; input_size as (height, width)."""
    flags = checkpoint.get("args") or {}
    flags = dict(flags if isinstance(flags, dict) else vars(flags))
    if "input_size" in flags:
        size = flags["input_size"]
        flags["input_size"] = (size, size) if isinstance(size, int) else (size[0], size[-1])
    return flags


# ---------------------------------------------------------------- resume

# A resumed run reports every other flag that changed.
FLAGS_WITHOUT_EFFECT = frozenset(
    "output_dir log_dir resume auto_resume save_ckpt save_ckpt_freq save_ckpt_steps save_ckpt_num print_freq "
    "profile_steps picture_freq num_workers pin_mem world_size local_rank dist_on_itp dist_url dist_timeout finetune "
    "model_key model_prefix job_dir".split()
)


def resume(run):
    """Restore the newest checkpoint in --output_dir, else --resume, if any, on all ranks at the same position."""
    utils.on_all_ranks(lambda: restore(run))
    positions = sorted(set(utils.all_gather((run.epoch, run.step))))
    if len(positions) > 1:
        raise UserError(
            f"--output_dir {run.args.output_dir}: ranks find different checkpoints there, of (epoch, step) "
            f"{positions}: it must be one folder for all machines"
        )


def restore(run):
    """Restore a run from a checkpoint, or its weights alone from a file of another program."""
    checkpoint, path = find_checkpoint(run.args)
    if checkpoint is None:
        return
    with utils.name_in_errors(path):
        load_model_and_ema(run, checkpoint, path)
    if checkpoint.get("format") is None:
        return log(f"weights from {path}, of another program: training starts at epoch {run.args.start_epoch}")
    try:
        check_resumable(run, checkpoint, path)
        run.load_state_dict(checkpoint)
    except KeyError as error:
        raise UserError(f"{path}: cannot resume: missing key {error}") from None
    except ValueError as error:  # of the optimizer: other groups, as another layer decay makes
        flags = " ".join(f"--{name} {checkpoint['args'].get(name)}" for name in ("layer_decay", "layer_decay_type"))
        raise UserError(f"{path}: cannot resume: saved with {flags}; use the same: {error}") from None
    report_changes(run, checkpoint, path)
    log(f"resuming from {path}: epoch {run.epoch}, step {run.step}")


def load_model_and_ema(run, checkpoint, path):
    """Load a checkpoint's weights and its EMA weights. If it has none, the average starts from the weights."""
    check_same_blocks(checkpoint.get("config", {}), run.model)
    load_weights(run.model, find_weights(checkpoint))
    if run.model_ema is None:
        return
    if "model_ema" in checkpoint:
        load_weights(run.model_ema.module, remap_checkpoint_keys(checkpoint["model_ema"]))
    else:
        run.model_ema.set(run.model)
        log(f"{path} has no EMA weights: the average starts from its weights")


def check_resumable(run, checkpoint, path):
    """Raise UserError for a change that does not fit the optimizer's state or the position in the epoch."""
    opt = checkpoint["args"].get("opt")
    if opt != getattr(run.args, "opt", None):
        raise UserError(f"{path}: cannot resume: saved with --opt {opt}; use the same")
    if checkpoint["class_names"] != run.class_names:
        raise UserError(f"{path}: {compare_classes(checkpoint['class_names'], run.class_names)}")
    for name, value in run.state_dict().items():
        if name in ("effective_batch_size", "num_images") and checkpoint["step"] and checkpoint[name] != value:
            raise UserError(
                f"{path}: cannot resume within an epoch: saved with {name.replace('_', ' ')} {checkpoint[name]}, "
                f"not {value}; use the same"
            )


def compare_classes(saved, current):
    """The difference between the classes of a checkpoint and those of the data, in words."""
    saved, current = (list(names or []) for names in (saved, current))
    if len(saved) != len(current):
        return f"has {len(saved)} classes, the data {len(current)}"
    i = next(i for i in range(len(current)) if saved[i] != current[i])
    return f"has other classes than the data: number {i} is {saved[i]!r}, not {current[i]!r}"


def report_changes(run, checkpoint, path):
    """Log every flag that changed since a checkpoint, but for those that have no effect on the numbers."""
    facts = ("num_images", "effective_batch_size")
    saved = checkpoint["args"] | {name: checkpoint[name] for name in facts}
    current = vars(run.args) | {name: run.state_dict()[name] for name in facts}
    for name in sorted(current.keys() - FLAGS_WITHOUT_EFFECT):
        before, now = saved.get(name), current[name]
        if (list(before) if isinstance(before, tuple) else before) != (list(now) if isinstance(now, tuple) else now):
            log(f"changed since {path}: {name} {before} -> {now}")
