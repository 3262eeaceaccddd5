"""Where a run stands: its position, means and best values; the hooks that observe it."""

import contextlib
import math
import os
import time
from pathlib import Path

import torch

import utils
from flags import at_least
from optim_factory import Schedule, effective_batch_size, load_moments
from utils import OneLineError, TrainingError, UserError, log


def add_watch_args(parser, default):
    """default: the metric that decides the best checkpoint if the user names none, or None."""
    add = parser.add_argument_group("best checkpoint and early stop").add_argument
    metric = "train_loss, or a metric of the evaluation or probe, that decides checkpoint-best.pth"
    add("--watch", metavar="METRIC", help=f"{metric}; None: {default}")
    patience = "stop after so many measurements of --watch without a best; 0: never"
    add("--early_stop", default=0, type=at_least(0), help=patience)


def check_watch_args(args, watch, metrics):
    """Raise UserError unless the watched metric is among those that are measured; --early_stop needs one."""
    if watch not in (None, *metrics):
        raise UserError(f"--watch {watch}: must be one of {', '.join(metrics)}")
    if args.early_stop and watch is None:
        raise UserError(f"--early_stop {args.early_stop}: give --watch too, one of {', '.join(metrics)}")


# ---------------------------------------------------------------- the state of a run


class Means:
    """Running means by name; totals: {name: (sum, count)}."""

    def __init__(self, totals=()):
        self.totals = dict(totals)

    def add(self, values):
        for name, value in values.items():
            total, count = self.totals.get(name, (0.0, 0))
            self.totals[name] = (total + value, count + 1)

    def values(self):
        return {name: total / count for name, (total, count) in self.totals.items()}


class Run:
    """What the epoch loop moves, hooks observe and checkpoints keep.

    The same on every rank, except numbers passed to `observe` and metrics that hooks measure on the main rank alone.

    model: without DDP and compilation. sampler: of the training set, None for an evaluation. images: the image set.
    model_ema: timm's ModelEmaV3 or None. task: a `tasks.Task`, None in pre-training. watch: the metric of the best
    checkpoint or None. watch_ema: whether the same metric of the EMA weights has a best checkpoint of its own.
    hooks: a `Hooks`, None for none.
    """

    def __init__(
        self, args, model, device, optimizer=None, sampler=None, images=(),
        model_ema=None, task=None, watch=None, watch_ema=False, hooks=None,
    ):  # fmt: skip
        self.args, self.device = args, device
        self.model, self.model_ema, self.optimizer = model, model_ema, optimizer
        # keeps float16 gradients in range; disabled for other dtypes
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.use_amp and args.amp_dtype == "float16")
        self.sampler, self.images, self.task = sampler, images, task
        self.class_names = task and task.names  # of the outputs, in the order of the head; None in pre-training
        self.evaluating = sampler is None  # and nothing else
        self.steps_per_epoch = 0 if self.evaluating else sampler.steps_per_epoch
        self.schedule = None if self.evaluating else Schedule(args, self.steps_per_epoch)
        self.n_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.lr = 0.0
        self.evaluations = {}  # the last `Evaluation`s: "" of the model, "_ema" of the EMA weights
        self.stop_requested = lambda: False  # whether a signal came: then evaluations give up
        self.watched = [f"{watch}{suffix}" for suffix in (["", "_ema"] if watch_ema else [""])] if watch else []
        self.best = {}  # by watched metric: value, its epoch, measurements since
        self.unreadable_images = {}  # names that any rank met, in order
        self.hooks = hooks or Hooks([])
        self.add_picture = lambda run, title, picture: None  # where pictures are shown
        self.between_steps = True  # whether weights and optimizer are those after `step` steps
        self.step_losses = []  # of this rank, of the batches of the step under way
        self.unread_losses, self.unread_names = [], []  # of this rank's finished steps, since they were last read
        self.start_epoch(args.start_epoch)
        self.start_lap()

    # ---- position

    @property
    def epochs_done(self):
        """That the weights have seen, with a fraction."""
        return self.epoch + self.step / max(self.steps_per_epoch, 1)

    def is_finished(self, epoch):
        """Whether `epoch` is not trained: the last one is done, or --watch has not improved for --early_stop."""
        since = min((since for _, _, since in self.best.values()), default=0)
        return epoch >= self.args.epochs or 0 < self.args.early_stop <= since

    def is_last_epoch(self):
        return self.is_finished(self.epoch + 1)

    def is_due(self, every):
        """Whether work that is done every so many epochs, after the first and last, is due at the end of this one."""
        done = self.epoch + 1
        return every > 0 and (done % every == 0 or done == 1 or self.is_last_epoch())

    def start_epoch(self, epoch):
        self.epoch, self.step = epoch, 0  # optimizer steps done in this epoch
        self.metrics = {}  # numbers of this epoch, by their names in log.txt
        self.interrupted = False  # whether a signal interrupted its evaluation or probe
        self.epoch_means, self.epoch_images, self.epoch_seconds = Means(), 0, 0.0  # up to the last log line

    # ---- within an epoch

    def is_time_to_log(self):
        return self.step % self.args.print_freq == 0 or self.step == self.steps_per_epoch

    def start_lap(self):
        """Start what one log line covers."""
        self.lap_start, self.lap_batches, self.lap_means = time.perf_counter(), 0, Means()

    def add_batch(self, batch, seconds):
        """Count a batch and the seconds that the loader kept the step waiting for it."""
        self.lap_batches += 1
        self.lap_means.add({"data_seconds": seconds})
        self.unread_names += batch.unreadable

    def add_losses(self, losses):
        """Keep the loss of a batch and its terms, {name: scalar tensor}, without waiting for the device."""
        self.step_losses.append({name: value.detach().clone() for name, value in losses.items()})

    def end_step(self):
        """Count a step, whose weights are final."""
        self.step, self.between_steps = self.step + 1, True
        self.unread_losses += self.step_losses
        self.step_losses = []

    def observe(self, **values):
        """For hooks: numbers of a step. Log lines show their mean since the last line; log.txt that over the epoch."""
        values = {name: float(value) for name, value in values.items()}
        self.lap_means.add(values)
        self.epoch_means.add(values)

    def end_lap(self):
        """Close what a log line covers, `lap`: means, images_per_second, data_seconds a batch. On all ranks."""
        self.read_losses()
        images = self.lap_batches * self.args.batch_size * utils.get_world_size()
        seconds = time.perf_counter() - self.lap_start
        self.epoch_images, self.epoch_seconds = self.epoch_images + images, self.epoch_seconds + seconds
        self.lap = self.lap_means.values() | {"images_per_second": images / seconds}
        self.start_lap()

    def read_losses(self, alone=False):
        """Fetch the losses of the steps since the last call, averaged over all ranks, which call this at the same step.

        alone: without the others. Raises TrainingError, on all of them, at a loss that is not finite.
        """
        if not self.unread_losses:
            return
        names = list(self.unread_losses[0])
        losses = torch.stack([torch.stack([terms[name].float() for name in names]) for terms in self.unread_losses])
        here = losses.cpu(), self.unread_names
        ranks = [here] if alone else utils.all_gather(here)
        self.unreadable_images |= dict.fromkeys(name for _, unreadable in ranks for name in unreadable)
        self.unread_losses, self.unread_names = [], []
        means = torch.stack([losses for losses, _ in ranks]).mean(0)  # (ranks, batches, names) -> (batches, names)
        for index, values in enumerate(means.tolist()):
            if not math.isfinite(values[0]):
                batch = self.step * self.args.update_freq - len(losses) + index
                report_nonfinite_loss(self, values[0], batch, not losses[index, 0].isfinite(), alone)
            # one by one, so that the sum over an epoch does not depend on how often losses are read
            self.observe(**dict(zip(names, values, strict=True)))

    # ---- the end of an epoch

    def add_evaluations(self, evaluations):
        """Keep the evaluations of an epoch, by suffix ("", "_ema"); None is one that a signal interrupted."""
        self.interrupted = None in evaluations.values()
        self.evaluations = {suffix: evaluation for suffix, evaluation in evaluations.items() if evaluation is not None}
        for suffix, evaluation in self.evaluations.items():
            self.metrics |= {f"test_{name}{suffix}": value for name, value in evaluation.metrics().items()}
            self.add_unreadable(evaluation.unreadable)

    def add_unreadable(self, names):
        """Keep the main rank's list of the names of images that could not be read."""
        self.unreadable_images |= dict.fromkeys(utils.on_main_rank(lambda: names))

    def close_epoch(self):
        """Complete the metrics of an epoch, and note whether it is the best."""
        train = {f"train_{name}": value for name, value in self.epoch_means.values().items()}
        train["train_lr"] = self.lr
        if self.epoch_seconds:
            train["images_per_second"] = round(self.epoch_images / self.epoch_seconds, 1)
        self.metrics = train | self.metrics
        self.best_before = self.best
        self.best = utils.on_main_rank(self.update_best)  # the last bit of a mean may differ between machines

    def update_best(self):
        """`best` with the metrics of this epoch."""
        best = dict(self.best)
        for name in (name for name in self.watched if name in self.metrics):
            value = self.metrics[name]
            is_new = name not in best or is_better(name, value, best[name][0])
            best[name] = [value, self.epoch, 0] if is_new else [*best[name][:2], best[name][2] + 1]
        return best

    def is_best(self, name):
        return name in self.best and self.best[name][1] == self.epoch

    # ---- checkpoints

    @property
    def facts(self):
        """What must stay the same when a run resumes within an epoch."""
        return {
            "effective_batch_size": effective_batch_size(self.args),
            "num_images": len(self.images),
            "sample_order": getattr(self.sampler, "order", None),  # None: evaluation
        }

    def state_dict(self):
        """What a checkpoint keeps besides weights, optimizer, scaler, position and flags."""
        return {
            "lr": self.lr,
            "epoch_means": self.epoch_means.totals,
            "unreadable_images": list(self.unreadable_images),
            "best": self.best,
            "class_names": self.class_names,
            "task": self.task and self.task.state_dict(),
            "hooks": self.hooks.state_dict(),
            **self.facts,
        }

    def describe_stop(self):
        """For errors: that numbers which are not finite stop the run, and what may help."""
        saved = self.args.output_dir and any(Path(self.args.output_dir).glob("checkpoint-*.pth"))
        kept = "The last checkpoint is from before. " if saved else ""
        return f"stopped. {kept}Try a lower --blr, or --amp_dtype bfloat16"

    def load_state_dict(self, checkpoint):
        """Continue where a checkpoint of this project was written."""
        load_moments(self.optimizer, checkpoint["optimizer"])
        if checkpoint["scaler"]:  # of a run in float16
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.epoch, self.step = checkpoint["epoch"], checkpoint["step"]
        if self.step:
            means = checkpoint.get("epoch_means") or {"loss": checkpoint["epoch_loss"]}  # of format 1
            self.epoch_means, self.lr = Means(means), checkpoint["lr"]
        self.unreadable_images = dict.fromkeys(checkpoint["unreadable_images"])
        self.best = {name: best for name, best in checkpoint["best"].items() if name in self.watched}
        self.hooks.load_state_dict(checkpoint.get("hooks", {}))


def is_better(name, value, other):
    """Whether a metric of that name is better than another value; any number is better than nan and infinity."""
    if not (math.isfinite(value) and math.isfinite(other)):
        return math.isfinite(value)
    is_error = any(word in name for word in ("loss", "mae", "mse", "error"))
    return value < other if is_error else value > other


def report_nonfinite_loss(run, loss, batch, is_local, alone):
    """Raise TrainingError, naming the images of a batch. is_local: whether the loss of this rank is not finite.

    alone: without the other ranks.
    """
    names = [run.images.name(index) for index in run.sampler.batch_indices(run.epoch, batch)] if is_local else []
    names = names if alone else sum(utils.all_gather(names), [])
    examples = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    path = Path(run.args.output_dir) / "nonfinite_batch.txt"

    def write():
        with contextlib.suppress(OSError):  # a full disk does not hide the message
            path.write_text("".join(f"{name}\n" for name in names), errors="surrogateescape")
            return f" (all in {path})"
        return ""

    if run.args.output_dir:
        examples += write() if alone else utils.on_main_rank(write)
    raise TrainingError(
        f"loss is {loss} in epoch {run.epoch}, step {batch // run.args.update_freq + 1} of {run.steps_per_epoch}: "
        f"{run.describe_stop()}. Batch: {examples}"
    )


# ---------------------------------------------------------------- hooks


class Hook:
    """Called at set points of a run, on every rank, so that a hook may use collective operations.

    A hook with main_only = True is called on the main rank alone, and must not use them. It may keep a state across
    resumes: state_dict() -> what torch.save(weights_only) can read, load_state_dict(state); the main rank's is saved.
    """

    main_only = False

    def on_start(self, run):
        """Before the first epoch of this process."""

    def on_epoch_start(self, run): ...

    def on_gradients(self, run):
        """Before an optimizer step: gradients are accumulated, unscaled, averaged over the ranks, not clipped yet."""

    def on_step(self, run):
        """After an optimizer step; `run.step` counts it already."""

    def on_log(self, run):
        """Every print_freq steps and after the last step of an epoch, before `on_step`: `run.lap` is complete."""

    def on_evaluate(self, run):
        """After the last step of an epoch and its evaluation: the time to measure, into `run.metrics`."""

    def on_epoch_end(self, run):
        """Then: `run.metrics` is complete; `run.epoch` is that epoch. Also at the end of --eval true."""

    def on_end(self, run):
        """After the last epoch."""

    def on_error(self, run):
        """After any error within an epoch, with weights and optimizer as after `run.step` steps. No collectives."""

    def state_dict(self):
        return None

    def load_state_dict(self, state): ...


class Hooks:
    """Call a list of hooks in their order: hooks("on_step", run). The order has no effect on the training.

    A file that a main_only hook cannot write stops no run. Any other error of a hook ends the run, with its name.
    """

    def __init__(self, hooks):
        self.hooks = [hook for hook in hooks if utils.is_main_process() or not hook.main_only]

    def __call__(self, event, run):
        for hook in list(self.hooks):
            try:
                getattr(hook, event)(run)
            except OneLineError:
                raise
            except Exception as error:
                if not hook.main_only or not isinstance(error, OSError):
                    place = f"{event}, epoch {run.epoch}, step {run.step}"
                    raise RuntimeError(f"hook {type(hook).__name__} failed ({place}): {error!r}") from error
                log(f"{type(hook).__name__} failed: {error}. Training continues.")
                if event == "on_start":  # it lacks what it needs
                    self.hooks.remove(hook)

    def state_dict(self):
        states = {type(hook).__name__: hook.state_dict() for hook in self.hooks}
        return {name: state for name, state in states.items() if state is not None}

    def load_state_dict(self, states):
        for hook in self.hooks:
            if type(hook).__name__ in states:
                hook.load_state_dict(states[type(hook).__name__])


# ---------------------------------------------------------------- the first lines


def log_configuration(run, model_description, num_workers):
    """Print what a person checks before leaving a run alone."""
    args, schedule = run.args, run.schedule
    precision = f"{args.amp_dtype} autocast" if args.use_amp else "float32"
    compiled = ", compiled" if args.compile else ""
    ranks = utils.format_count(utils.get_world_size(), "rank")
    steps = f"{utils.format_count(run.steps_per_epoch, 'step')} of {effective_batch_size(args)} an epoch"
    where = f"epoch {run.epoch}, step {run.step}" if run.epochs_done else "the beginning"
    log(f"{args.model}, {model_description}")
    images, epochs = utils.format_count(len(run.images), "image"), utils.format_count(args.epochs, "epoch")
    log(f"{images}, {steps}, {epochs}, from {where}; seed {args.seed}")
    decay = f"weight decay {args.weight_decay:g}"
    log(f"peak learning rate {schedule.peak_lr:.2e} after {schedule.warmup_epochs:g} epochs of warm-up; {decay}")
    if schedule.warmup_epochs >= args.epochs:
        log(f"warm-up of {schedule.warmup_epochs:g} epochs: the learning rate rises during all of {args.epochs}")
    log(f"{ranks} on {run.device}, {precision}{compiled}; {num_workers} loader workers each")
    log(f"output: {args.output_dir or 'none'}; torch {torch.__version__}")
    if run.device.type == "cpu":
        for hint in hint_at_threads(torch.get_num_threads(), len(os.sched_getaffinity(0)), os.getloadavg()[0]):
            log(hint)


def hint_at_threads(threads, cores, load):
    """[a hint] if other processes or too few cores make threads wait for each other, else nothing."""
    if threads == 1 or threads <= cores and load < 0.75 * cores:
        return []
    free = max(round(cores - load), 1)
    return [f"hint: {threads} threads on {cores} cores with a load of {load:.1f}: OMP_NUM_THREADS={free} may be faster"]
