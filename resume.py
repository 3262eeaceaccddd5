"""How a run stops and resumes: checkpoints in time, after a signal or an error, and the way back from them.

`StopOnSignal` notes a signal and acts on it after the step under way, `Checkpointer` saves, and the same command starts
again with `resume_run`. What a checkpoint holds, and how it is written and read, is in `checkpoints.py`.
"""

import signal
import time

import torch
import torch.distributed as dist

import checkpoints
import utils
from loaders import Loader
from models.weights import check_same_blocks, find_weights, load_weights, remap_checkpoint_keys
from run import Hook
from utils import TrainingError, UserError, log

# ---------------------------------------------------------------- stop


class Checkpointer(Hook):
    """A checkpoint every --save_ckpt_freq epochs, after the last one, and every --save_ckpt_steps steps of an epoch.

    And one after each epoch that is the best by --watch: checkpoint-best.pth, or checkpoint-best-ema.pth by the EMA
    weights, with encoder-best.pth or encoder-best-ema.pth, the weights of the encoder alone.
    """

    LATER = ". Earlier ones are kept, training continues, the next save tries again."
    last_written = None  # epoch and step of the last checkpoint, on the main rank

    def on_step(self, run):
        every = run.args.save_ckpt_steps
        if every and run.step % every == 0 and run.step != run.steps_per_epoch:
            self.save(run, step=run.step)

    def on_epoch_end(self, run):
        best = [name.endswith("_ema") for name in run.watched if run.is_best(name)]
        if best and not utils.on_main_rank(lambda: self.attempt(run, lambda: checkpoints.save_best(run, best))):
            run.best = run.best_before  # what is on disk
        if (run.epoch + 1) % run.args.save_ckpt_freq == 0 or run.is_last_epoch():
            self.save(run, is_last=run.is_last_epoch())

    def on_error(self, run):
        if self.save_alone(run):
            log(f"saved at epoch {run.epoch}, step {run.step}: the same command resumes from here")

    def save_alone(self, run):
        """Write the steps that are done, on the main rank; whether that succeeded.

        Without the other ranks, which may have failed: the mean loss lacks what they have not shared.
        """
        if not utils.is_main_process():
            return False
        run.read_losses(alone=True)
        return self.attempt(run, lambda: self.write(run, run.step), note="")

    def save(self, run, step=None, is_last=False):
        """Write a checkpoint, if it is not there yet. On all ranks, at the same step. Raises as `attempt` does."""
        run.read_losses()
        utils.on_main_rank(lambda: self.attempt(run, lambda: self.write(run, step), is_last))

    def attempt(self, run, write, is_last=False, note=LATER):
        """Call write(), on the main rank; whether that succeeded. If not, log why, with a note.

        Raises TrainingError if the weights are not finite, or if write() fails and the run ends here (is_last).
        """
        if not torch.nn.utils.get_total_norm(run.model.parameters()).isfinite():
            place = f"after step {run.step} of epoch {run.epoch}"
            raise TrainingError(f"weights are not finite {place}: {run.describe_stop()}")
        try:
            write()
            return True
        except OSError as error:
            if is_last:
                raise TrainingError(f"the last checkpoint could not be saved: {error}") from None
            log(f"checkpoint not saved: {error}{note}")
            return False

    def write(self, run, step):
        """On the main rank. Raises OSError."""
        if self.last_written != (run.epoch, step):
            checkpoints.save_model(
                run.args, run.epoch, None, run.model, run.optimizer, run.scaler, run.model_ema, step, **run.state_dict()
            )
            self.last_written = (run.epoch, step)


class StopOnSignal(Hook):
    """After Ctrl-C, or a signal of a terminal or scheduler before it ends the process: save and stop, on all ranks.

    The signal is only noted; the step under way is finished first, so nothing is cut short, however many signals come;
    but a second Ctrl-C ends the process at once. Ranks agree every `PATIENCE` seconds or so, not every step. A process
    that waits for a batch does not go on waiting: it saves the steps that are done, at once if it is alone and waits
    already, else after `GRACE` seconds, without the other ranks, who may wait for it. Raises `utils.Stopped`.
    """

    PATIENCE, GRACE = 2.0, 10.0

    def __init__(self, checkpointer=None):
        self.checkpointer = checkpointer
        self.received = 0  # the number of the signal
        self.every = self.left = 1  # steps between two agreements, and those left

    def on_start(self, run):
        self.run = run
        heard = [signum for signum in utils.STOP_SIGNALS if signal.getsignal(signum) != signal.SIG_IGN]  # nohup
        self.previous = {signum: signal.signal(signum, self.note) for signum in heard}
        self.agreed = time.perf_counter()
        run.stop_requested = lambda: bool(self.received)

    def note(self, signum, frame):
        if self.received == signum == signal.SIGINT:
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise KeyboardInterrupt
        if self.received:
            return
        self.received = signum
        signal.signal(signal.SIGALRM, lambda *_: self.stop_waiting(self.GRACE))
        signal.setitimer(signal.ITIMER_REAL, self.GRACE, self.GRACE / 10)
        if not dist.is_initialized():
            self.stop_waiting(0)

    def stop_waiting(self, seconds):
        """Stop, without the other ranks, if this one has waited for a batch for so long."""
        since, Loader.waiting_since = Loader.waiting_since, None
        if since is None or time.monotonic() - since < seconds:
            Loader.waiting_since = since
            return
        saved = self.checkpointer is not None and self.checkpointer.save_alone(self.run)
        self.stop(self.received, saved, alone=dist.is_initialized())

    def on_step(self, run):
        self.left -= 1
        if self.left <= 0 or run.step == run.steps_per_epoch:
            self.stop_if_requested(run, step=run.step)

    def on_evaluate(self, run):
        """An evaluation that was interrupted leaves nothing: it starts anew when the run resumes."""
        if run.interrupted:
            self.stop_if_requested(run, step=run.step)

    def on_epoch_end(self, run):
        self.stop_if_requested(run)

    def stop_if_requested(self, run, step=None):
        if received := self.agree():
            if self.checkpointer is not None:
                self.checkpointer.save(run, step=step, is_last=True)
            self.stop(received, saved=self.checkpointer is not None)

    def stop(self, received, saved, alone=False):
        signal.setitimer(signal.ITIMER_REAL, 0)
        handler = self.previous[received] if received in (signal.SIGUSR1, signal.SIGUSR2) else None
        # from here on signals are still noted, and change nothing
        raise utils.Stopped(received, saved, handler if callable(handler) else None, alone)

    def agree(self):
        """The signal that any rank has received, or 0, the same on all; they call this at the same step."""
        if not dist.is_initialized():
            return self.received
        now = time.perf_counter()
        facts = torch.tensor([self.received, now - self.agreed], dtype=torch.float64)
        dist.all_reduce(facts, dist.ReduceOp.MAX)
        received, seconds = facts.tolist()
        self.agreed = now
        if steps := self.every - self.left:  # since then
            self.every = max(1, min(2 * self.every, int(steps * self.PATIENCE / seconds)))
        self.left = self.every
        return int(received)

    def on_end(self, run):
        signal.setitimer(signal.ITIMER_REAL, 0)
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)


def saving_hooks(args):
    """What keeps a run from being lost, as far as --save_ckpt allows. Last in the list: what they save is logged."""
    checkpointer = Checkpointer() if args.output_dir and args.save_ckpt else None
    return ([checkpointer] if checkpointer else []) + [StopOnSignal(checkpointer)]


# ---------------------------------------------------------------- resume

# A resumed run reports every other flag that changed.
FLAGS_WITHOUT_EFFECT = frozenset(
    "output_dir log_dir resume auto_resume save_ckpt save_ckpt_freq save_ckpt_steps save_ckpt_num print_freq "
    "profile_steps picture_freq num_workers pin_mem world_size local_rank dist_on_itp dist_url dist_timeout finetune "
    "model_key model_prefix job_dir sample_order".split()  # the last is of --shuffle
)


def resume_run(run):
    """Restore the newest checkpoint in --output_dir, else --resume, if any, on all ranks at the same position."""
    utils.on_all_ranks(lambda: restore(run))
    positions = sorted(set(utils.all_gather((run.epoch, run.step))))
    if len(positions) > 1:
        raise UserError(
            f"--output_dir {run.args.output_dir}: ranks find different checkpoints there, of (epoch, step) "
            f"{positions}: it must be one folder for all machines"
        )


def find_checkpoint(args):
    """The checkpoint to resume from and its path: the newest in --output_dir, else --resume, else (None, None)."""
    checkpoint, path = checkpoints.newest_checkpoint(args.output_dir)
    if checkpoint is None and args.resume:
        checkpoint, path = checkpoints.load_checkpoint(args.resume), args.resume
    return checkpoint, path


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
        raise UserError(f"{path}: cannot resume: {error}; saved with {flags}: use the same") from None
    except (TypeError, AttributeError, RuntimeError) as error:  # of scaler and hooks
        raise UserError(f"{path}: cannot resume: a state is not what this version writes: {error}") from None
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
    check_same_task(checkpoint, run, path)
    if checkpoint["step"] > run.steps_per_epoch:
        raise UserError(f"{path}: cannot resume: step is {checkpoint['step']} of {run.steps_per_epoch} an epoch")
    saved = {"sample_order": 1} | checkpoint  # older ones have no number of their order
    for name, value in run.facts.items() if checkpoint["step"] else ():
        if saved[name] != value:
            raise UserError(
                f"{path}: cannot resume within an epoch: saved with {name.replace('_', ' ')} {saved[name]}, "
                f"not {value}; use the same, or a checkpoint of an epoch's end"
            )


def check_same_task(checkpoint, run, path):
    """Raise UserError if a checkpoint was trained for other targets; the loss may change."""
    classification = {"kind": "classification"}  # older checkpoints say nothing
    current = run.task.state_dict() if run.task else classification
    saved = classification | (checkpoint.get("task") or {})
    for name, value in current.items():
        if name != "loss" and saved.get(name) != value:
            problem = f"cannot resume: {name} of the targets is {saved.get(name)}, that of the data {value}"
            raise UserError(f"{path}: {problem}; use the same data and kind of --loss, or give it as --finetune")


def compare_classes(saved, current):
    """The difference between the classes of a checkpoint and those of the data, in words."""
    saved, current = (list(names or []) for names in (saved, current))
    if len(saved) != len(current):
        return f"has {utils.format_count(len(saved), 'class')}, the data {len(current)}"
    i = next(i for i in range(len(current)) if saved[i] != current[i])
    return f"has other classes than the data: number {i} is {saved[i]!r}, not {current[i]!r}"


def report_changes(run, checkpoint, path):
    """Log every flag that changed since a checkpoint, but for those that have no effect on the numbers."""
    saved = checkpoint["args"] | {name: checkpoint.get(name) for name in run.facts}
    current = vars(run.args) | run.facts
    for name in sorted(current.keys() - FLAGS_WITHOUT_EFFECT):
        values = saved.get(name), current[name]
        before, now = (list(value) if isinstance(value, tuple) else value for value in values)
        if before != now:
            log(f"changed since {path}: {name} {before} -> {now}")
