"""The files of a run: the output folder, its lock, checkpoints written whole and read safely.

    output_dir/
        checkpoint-9.pth        epoch 9 is done; the --save_ckpt_num newest are kept
        checkpoint-10-400.pth   400 optimizer steps of epoch 10 are done (--save_ckpt_steps); as many are kept
        checkpoint-best.pth     the best epoch by --watch; checkpoint-best-ema.pth by the EMA weights
        encoder-best.pth        the weights of its encoder alone; encoder-best-ema.pth likewise
        run.lock                held while a run writes here
        args.json               the flags
        log.txt                 one JSON object an epoch
        events.out.tfevents.*   TensorBoard
        profile-10-20.pt.trace.json.gz (--profile_steps 10:20)
        reconstruction-0009.png (pre-training)
        confusion.png, confusion.csv, per_class.csv or per_target.csv (fine-tuning, evaluation)

A checkpoint is a dict, readable by `torch.load(path, weights_only=True)`:

    format                  2
    model, model_ema        weights; the EMA weights with --model_ema
    config                  constructor arguments of the model: `FCMAE(**config)`, `ConvNeXtV2(**config)`
    optimizer, scaler       state dicts
    epoch, step             where to resume: epochs done, and optimizer steps done after them
    args                    the flags
    class_names, task       of fine-tuning: names of the outputs, and what they mean, see `tasks.Task.state_dict`
    ...                     `Run.state_dict()`: losses of the epoch so far, best values, hooks' states
"""

import argparse
import codecs
import contextlib
import csv
import errno
import functools
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
from models.weights import split_decoder
from schema import CHECKPOINT_FORMAT, check_schema, is_flags
from utils import TrainingError, UserError, log


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
    write_together({path: write})


def write_together(writers):
    """`write_whole` for {path: write}, in one folder: no file is replaced before all are on the disk."""
    with contextlib.ExitStack() as temporaries:
        written = {}
        for path, write in writers.items():
            path = Path(path)
            descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-", suffix=".tmp")
            temporaries.callback(Path(temporary).unlink, missing_ok=True)
            with os.fdopen(descriptor, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            written[temporary] = path
        for temporary, path in written.items():
            os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the new names too
        os.close(folder)


def write_text(path, text):
    """`write_whole` of a text; names of files in it may be any bytes."""
    write_whole(path, lambda file: file.write(text.encode(errors="surrogateescape")))


def write_csv(file, rows):
    """Write rows to a binary file; names of files in them may be any bytes."""
    csv.writer(codecs.getwriter("utf-8")(file, errors="surrogateescape")).writerows(rows)


def save_together(contents):
    """torch.save {path: content} by `write_together`. Raises OSError with the path and the system's reason."""

    def save(path, content, file):
        try:
            torch.save(content, file)
        except (OSError, RuntimeError) as error:
            # torch reports a failed write in words of its own; the system's reason is its context
            reason = error.__context__ if isinstance(error.__context__, OSError) else error
            raise OSError(f"{path}: {getattr(reason, 'strerror', None) or reason}") from error

    for path, content in contents.items():
        check_loadable(content, Path(path).name)
    try:
        write_together({path: functools.partial(save, path, content) for path, content in contents.items()})
    except OSError as error:
        if error.strerror is None:
            raise
        raise OSError(f"{next(iter(contents))}: {error.strerror}") from error


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
    for name in ("checkpoint-*.pth", "encoder-*.pth", "log.txt", "args.json", "*.png", "*.csv"):
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
    """The checkpoints that a run can resume from, newest first; the best ones last, for when they alone were kept."""
    numbered = [path for path in Path(output_dir).glob("checkpoint-*.pth") if checkpoint_position(path)]
    best = [Path(output_dir) / f"checkpoint-best{suffix}.pth" for suffix in ("", "-ema")]
    return sorted(numbered, key=checkpoint_position, reverse=True) + [path for path in best if path.exists()]


def save_model(
    args, epoch, model, model_without_ddp, optimizer, loss_scaler, model_ema=None, step=None, **run_state
):  # fmt: skip
    """Write output_dir/checkpoint-EPOCH.pth, or checkpoint-EPOCH-STEP.pth within an epoch, and delete the oldest ones.

    epoch: the epoch that is done, or in progress if `step` is given. run_state: `Run.state_dict()`. Only the main
    process writes. Raises OSError if that fails; the earlier checkpoints are then all still there.
    """
    if not utils.is_main_process():
        return
    content = checkpoint_content(args, epoch, model_without_ddp, optimizer, loss_scaler, model_ema, step)
    path = Path(args.output_dir) / (f"checkpoint-{epoch}.pth" if step is None else f"checkpoint-{epoch}-{step}.pth")
    save_together({path: content | run_state})
    delete_older(path, keep=args.save_ckpt_num)


def checkpoint_content(args, epoch, model, optimizer, scaler, model_ema=None, step=None):
    """The dict of a checkpoint but for `Run.state_dict()`; see `save_model`."""
    content = {
        "format": CHECKPOINT_FORMAT,
        "model": model.state_dict(),
        "config": model.config,
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "epoch": epoch + 1 if step is None else epoch,
        "step": step or 0,
        "args": dict(vars(args)),
    }
    return content if model_ema is None else content | {"model_ema": model_ema.module.state_dict()}


def save_best(run, ema_flags):
    """Write checkpoint-best.pth with encoder-best.pth and, for True in ema_flags, those of the EMA weights.

    All of them or, with OSError, none: the run's best values and these files say the same.
    """
    contents = {}
    content = checkpoint_content(run.args, run.epoch, run.model, run.optimizer, run.scaler, run.model_ema)
    for is_ema in ema_flags:
        model, suffix = (run.model_ema.module, "-ema") if is_ema else (run.model, "")
        weights, _ = split_decoder(model.state_dict())
        encoder = {key: value for key, value in weights.items() if not key.startswith(("norm.", "head."))}
        folder = Path(run.args.output_dir)
        contents[folder / f"checkpoint-best{suffix}.pth"] = content | run.state_dict()
        contents[folder / f"encoder-best{suffix}.pth"] = {"model": encoder, "config": model.config}
    save_together(contents)


def delete_older(path, keep):
    """Delete the checkpoints before `path` of its kind (end of an epoch or within), except the newest keep - 1."""
    position = checkpoint_position(path)
    numbered = filter(checkpoint_position, list_checkpoints(path.parent))
    older = [other for other in numbered if checkpoint_position(other) < position]
    same_kind = [other for other in older if (checkpoint_position(other)[1] == 0) == (position[1] == 0)]
    for other in same_kind[keep - 1 :]:
        other.unlink()


utils.save_model = save_model  # where the original has it


# ---------------------------------------------------------------- reading


def load_checkpoint(path):
    """The dict in a checkpoint file of any known form, verified; its tensors stay on disk until they are read.

    Raises UserError; DamagedCheckpoint for a file whose content is not what was written; TrainingError for an error of
    the disk or network, after which the file may be whole.
    """
    try:
        with utils.name_in_errors(path):
            if (checkpoint := files.read_other_file(path)) is not None:
                return checkpoint
        open(path, "rb").close()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    is_archive = zipfile.is_zipfile(path)
    try:
        if is_archive:
            verify_checksums(path)
        # The original pickles its flags as a Namespace: that one class is allowed, nothing else.
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except Exception as error:  # of torch, zipfile and pickle: nearly everything
        if isinstance(error, OSError) and error.errno in MEDIUM_ERRORS:
            raise TrainingError(f"{path}: cannot be read: {error.strerror}. Try again, or move it away") from None
        if isinstance(error, pickle.UnpicklingError) and (found := re.search(r"GLOBAL (\S+)", str(error))):
            accepted = "must hold tensors, numbers, strings, lists, dicts"
            raise UserError(f"{path}: holds a {found[1]}, whose loading could run code; {accepted}") from None
        accepted = "must be a file of torch.save, uncut and unchanged"
        raise DamagedCheckpoint(f"{path}: not a whole checkpoint; {accepted}") from None
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path}: holds a {type(checkpoint).__name__}; must hold a dict of weights")
    if "format" in checkpoint:
        check_schema(checkpoint, path)
    return checkpoint


MEDIUM_ERRORS = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.ENOMEM, errno.EINTR}


def verify_checksums(path):
    """Read an archive of torch.save once. Raises whatever zipfile does, or ValueError, unless every checksum is right.

    torch.load itself does not compare them.
    """
    with zipfile.ZipFile(path) as archive:
        if archive.testzip() is not None:
            raise ValueError


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


def training_flags(checkpoint):
    """The flags of the run that wrote a checkpoint, as far as it has them; input_size as (height, width).

    None, {}, of another program whose flags have other meanings.
    """
    flags = checkpoint.get("args")
    flags = vars(flags) if isinstance(flags, argparse.Namespace) else flags
    if not is_flags(flags):
        return {}
    size = flags.get("input_size")
    if size is not None:
        flags = flags | {"input_size": (size, size) if isinstance(size, int) else (size[0], size[-1])}
    return flags
