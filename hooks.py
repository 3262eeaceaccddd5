"""What happens around training: log lines, TensorBoard, pictures, profiles, checkpoints; and what they are told.

A hook reads the `RunState` and does not change the training; what it measures it puts into `state.metrics`. To add one,
write a class and put it into the list in `build_hooks` of `main_pretrain.py` or `main_finetune.py`, anywhere:

    class WeightNorm(hooks.Hook):
        def on_evaluate(self, state):
            state.metrics["weight_norm"] = torch.nn.utils.get_total_norm(state.model.parameters()).item()
"""

import argparse
import contextlib
import csv
import io
import json
import math
import re
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import utils
from datasets import Batch
from models.checkpoints import split_decoder
from tools.pictures import draw_confusion, reconstruct
from utils import UserError, str2bool


def add_output_args(parser, watched):
    """The flags of what a run writes. watched: which metric decides the best checkpoint if the person does not say."""
    group = parser.add_argument_group("checkpoints and logs")
    group.add_argument("--output_dir", default="", metavar="FOLDER", help="for all that is written; empty: nothing is")
    group.add_argument("--log_dir", default=None, metavar="FOLDER", help="for TensorBoard; None: the output folder")
    group.add_argument("--save_ckpt", default=True, type=str2bool, help="write checkpoints")
    group.add_argument("--save_ckpt_freq", default=1, type=int, help="epochs between checkpoints")
    group.add_argument("--save_ckpt_steps", default=0, type=int, help="steps between those within an epoch; 0: none")
    group.add_argument("--save_ckpt_num", default=3, type=int, help="checkpoints kept, of each of the two kinds")
    group.add_argument(
        "--auto_resume", default=True, type=str2bool, help="go on from the newest checkpoint in the output folder"
    )
    group.add_argument(
        "--resume", default="", metavar="FILE", help="checkpoint to start from where the output folder has none"
    )
    group.add_argument(
        "--watch",
        default=None,
        metavar="METRIC",
        help=f"train_loss, or what a probe or an evaluation measures: chooses checkpoint-best.pth; None: {watched}",
    )
    group.add_argument(
        "--early_stop", default=0, type=int, help="measurements of --watch without a better one that end it; 0: never"
    )
    group.add_argument("--print_freq", default=20, type=int, help="steps between log lines")
    group.add_argument(
        "--profile_steps",
        default=None,
        type=steps_from_to,
        metavar="A:B",
        help="trace the optimizer steps from A to before B of this process, counted from 0",
    )


def steps_from_to(text):
    """Argument type of A:B."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not two step numbers A:B, the first below the second")
    return int(match[1]), int(match[2])


def check_output_args(args, metrics):
    """Raise UserError for values that cannot work. metrics: names of what is measured at the end of epochs."""
    utils.check_least(args, 1, "save_ckpt_freq save_ckpt_num print_freq")
    utils.check_least(args, 0, "save_ckpt_steps early_stop")
    if args.watch not in (None, *metrics):
        raise UserError(f"--watch {args.watch}: must be one of {', '.join(metrics)}")
    if args.early_stop and args.watch is None:
        raise UserError(f"--early_stop {args.early_stop}: give --watch too, one of {', '.join(metrics)}")
    if args.profile_steps and not args.output_dir:
        raise UserError(f"--profile_steps {args.profile_steps[0]}:{args.profile_steps[1]}: give an --output_dir too")


class Mean:
    """A running mean."""

    def __init__(self, sum=0.0, count=0):
        self.sum, self.count = sum, count

    def add(self, values):
        for value in values:  # one by one, so that the sum does not depend on how they were grouped
            self.sum += value
            self.count += 1

    @property
    def value(self):
        return self.sum / max(self.count, 1)


class RunState:
    """Where a run stands: what hooks read and checkpoints keep.

    The same on every process, but for its own images and for what hooks of the main process measure.
    """

    def __init__(
        self, args, model, optimizer=None, scaler=None, sampler=None, images=(), model_ema=None, class_names=None
    ):
        self.args = args
        self.model = model  # without DDP and compilation
        self.optimizer = optimizer
        self.scaler = scaler
        self.sampler = sampler
        self.images = images
        self.steps_per_epoch = sampler.steps_per_epoch if sampler else 0
        self.num_images = len(images)
        self.model_ema = model_ema  # averaged weights, or None
        self.class_names = class_names
        self.metrics = {}  # numbers of this epoch, by their names in log.txt
        self.evaluations = {}  # the last ones, by what was evaluated: "" the model, "_ema" the averaged weights
        self.given_up = False  # whether this epoch's were, since a signal came
        self.best = {}  # of args.watch, also by averaged weights: value, its epoch, how often measured since
        self.evaluating = getattr(args, "eval", False)  # and nothing else
        self.device_type = torch.device(args.device).type
        self.n_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.epoch = args.start_epoch
        self.step = 0  # optimizer steps done in this epoch
        self.lr = 0.0
        self.epoch_loss = Mean()  # of this epoch's losses, as far as they were read
        self.epoch_images, self.epoch_seconds = 0, 0.0  # trained of it by this process and its peers
        self.lap_loss = Mean()  # of those since the last log line
        self.unread_losses = []  # tensors on the device
        self.unreadable_images = {}  # names that all processes met, in order
        self.unread_names = []  # those that this one met since
        self.stop_requested = lambda: False  # whether to give up what can be made again
        self.loss = self.images_per_second = self.data_seconds = math.nan  # as of the last log line
        self.start_lap()

    @property
    def epochs_done(self):
        """With a fraction."""
        return self.epoch + self.step / max(self.steps_per_epoch, 1)

    @property
    def epochs_evaluated(self):
        """How many epochs the weights have seen that `evaluations` are of: they are made before an epoch is closed."""
        return self.epoch + (not self.evaluating)

    def time_to_log(self):
        return self.step % self.args.print_freq == 0 or self.step == self.steps_per_epoch

    def due(self, every):
        """Whether, at the end of an epoch, it is time for what is done every so many, after the first and the last."""
        done = self.epoch + 1
        return every > 0 and (done % every == 0 or done == 1 or self.ends_before(done))

    def ends_before(self, epoch):
        """Whether this epoch is not trained: all before it were asked for, or --watch has not improved for too long."""
        since = min((since for _, _, since in self.best.values()), default=0)
        return epoch >= self.args.epochs or 0 < self.args.early_stop <= since

    def start_lap(self):
        """Start the clock: what is logged is measured from one log line to the next."""
        self.clock = self.lap_start = time.perf_counter()
        self.data_time, self.batches = 0.0, 0
        self.lap_loss = Mean()

    def end_lap(self):
        """Set what is logged: loss, images_per_second, data_seconds (waited for a batch). On all processes at once."""
        self.read_losses()
        images = self.batches * self.args.batch_size * utils.get_world_size()
        seconds = time.perf_counter() - self.lap_start
        self.images_per_second = images / seconds
        self.epoch_images, self.epoch_seconds = self.epoch_images + images, self.epoch_seconds + seconds
        self.data_seconds = self.data_time / self.batches
        self.loss = self.lap_loss.value
        self.start_lap()

    def observe_data(self, batch):
        """Note that the loader handed over a batch, and how long that took."""
        self.data_time += time.perf_counter() - self.clock
        self.batches += 1
        self.unread_names += batch.unreadable

    def observe_loss(self, loss):
        """Keep the loss of a batch, without waiting for the device."""
        self.unread_losses.append(loss.detach())
        self.clock = time.perf_counter()

    def read_losses(self):
        """Fetch what came up since the last time from the device and all processes: all must call it at the same step.

        Raises TrainingError, on all of them, at a loss that is not finite.
        """
        if not self.unread_losses:
            return
        losses, names = torch.stack(self.unread_losses).float(), [self.unread_names]
        own = losses
        if dist.is_initialized():
            losses = own.clone()
            dist.all_reduce(losses)
            losses /= dist.get_world_size()
            names = [None] * dist.get_world_size()
            dist.all_gather_object(names, self.unread_names)
        self.unread_losses, self.unread_names = [], []
        self.unreadable_images |= dict.fromkeys(name for some in names for name in some)
        values = losses.tolist()
        bad = next((index for index, value in enumerate(values) if not math.isfinite(value)), None)
        if bad is not None:
            batch = self.step * self.args.update_freq - len(values) + bad
            self.refuse_loss(values[bad], batch, names=[] if own[bad].isfinite() else self.names_of_batch(batch))
        self.epoch_loss.add(values)
        self.lap_loss.add(values)

    def names_of_batch(self, batch):
        """The files of this process's batch of that number in this epoch."""
        indices = self.sampler.part(self.sampler.order(self.epoch), batch)
        return [self.images.name(index) for index in dict.fromkeys(indices.tolist())]

    def refuse_loss(self, loss, batch, names):
        """Raise TrainingError for a loss that is not finite; names: of the images that made it so on this process."""
        if dist.is_initialized():
            everywhere = [None] * dist.get_world_size()
            dist.all_gather_object(everywhere, names)
            names = [name for some in everywhere for name in some]
        examples = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        if self.args.output_dir and utils.is_main_process():
            path = Path(self.args.output_dir) / "nonfinite_batch.txt"
            with contextlib.suppress(OSError):  # a full disk does not hide the message
                path.write_text("".join(f"{name}\n" for name in names), errors="surrogateescape")
                examples += f" (all in {path})"
        raise utils.TrainingError(
            f"loss is {loss} in epoch {self.epoch}, step {batch // self.args.update_freq + 1} of "
            f"{self.steps_per_epoch}: stopped. The last checkpoint is from before. A lower --blr or --amp_dtype "
            f"bfloat16 may help. In the batch: {examples}"
        )

    def observe_evaluations(self, evaluations):
        """Keep the evaluations of an epoch, by what was evaluated; none of them if one was given up."""
        self.given_up = None in evaluations.values()
        self.evaluations = {} if self.given_up else evaluations
        for what, evaluation in self.evaluations.items():
            self.metrics |= {f"test_{name}{what}": value for name, value in evaluation.metrics().items()}
            self.observe_unreadable(evaluation.unreadable)

    def observe_unreadable(self, names):
        """Keep the names of images, which all processes met, or each by itself: those of the main process count."""
        self.unreadable_images |= dict.fromkeys(utils.on_main_process(lambda: names))

    def sum_up(self):
        """Complete the metrics of an epoch, and note whether it is the best."""
        trained = {"train_loss": self.epoch_loss.value, "train_lr": self.lr}
        if self.epoch_seconds:
            trained["images_per_second"] = round(self.epoch_images / self.epoch_seconds, 1)
        self.metrics = trained | self.metrics
        self.best_before = self.best
        self.best = utils.on_main_process(self.judge)  # the last bit of a mean may differ between machines

    def judge(self):
        """`best` with the metrics of this epoch."""
        best = dict(self.best)
        for name in [name for name in self.watched() if name in self.metrics]:
            value = self.metrics[name]
            if name not in best or not math.isfinite(best[name][0]) or self.is_better(name, value, best[name][0]):
                best[name] = [value, self.epoch, 0]
            else:
                best[name] = [*best[name][:2], best[name][2] + 1]
        return best

    @staticmethod
    def is_better(name, value, other):
        return value < other if "loss" in name else value > other

    def watched(self):
        """The watched metric, and the same by averaged weights if these are evaluated."""
        ema = getattr(self.args, "model_ema_eval", False)
        return [self.args.watch] + ([f"{self.args.watch}_ema"] if ema else [])

    def is_best(self, name):
        return name in self.best and self.best[name][1] == self.epoch

    def progress(self):
        """What a checkpoint keeps besides model, averaged model, optimizer, scaler, epoch and step."""
        return {
            "epoch_loss": [self.epoch_loss.sum, self.epoch_loss.count],
            "lr": self.lr,
            "unreadable_images": list(self.unreadable_images),
            "effective_batch_size": self.args.effective_batch_size,
            "num_images": self.num_images,
            "class_names": self.class_names,
            "best": self.best,
        }

    def restore(self, checkpoint):
        """Stand where a checkpoint of this project was written."""
        names = ("weight_decay", "lr_scale", "betas", "eps", "momentum")
        flags = [{name: group[name] for name in names if name in group} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        for group, now in zip(self.optimizer.param_groups, flags, strict=True):
            group.update(now)  # the flags of now, with the moments of then
        if checkpoint["scaler"]:  # of a run in float16
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.epoch, self.step = checkpoint["epoch"], checkpoint["step"]
        if self.step:
            self.epoch_loss, self.lr = Mean(*checkpoint["epoch_loss"]), checkpoint["lr"]
        self.unreadable_images = dict.fromkeys(checkpoint["unreadable_images"])
        self.best = {name: best for name, best in checkpoint["best"].items() if name in self.watched()}

    def end_epoch(self):
        self.epoch, self.step = self.epoch + 1, 0
        self.epoch_loss = Mean()
        self.epoch_images, self.epoch_seconds = 0, 0.0
        self.metrics = {}


class Hook:
    """Called at set points of a run with its `RunState`; by default on the main process only.

    There it must do without the other processes, which do not wait for it: a collective operation raises.
    """

    everywhere = False  # True: on every process. What a hook does there must be the same on each.

    def on_start(self, state):
        """Before the first epoch of this process."""

    def on_epoch_start(self, state): ...

    def on_step(self, state):
        """After an optimizer step; `state.step` counts it already."""

    def on_log(self, state):
        """Every print_freq steps and after the last step of an epoch, before `on_step`."""

    def on_evaluate(self, state):
        """After the last step of an epoch and its evaluation: the time to measure, into `state.metrics`."""

    def on_epoch_end(self, state):
        """After that: `state.metrics` is complete; `state.epoch` is that epoch. Also at the end of --eval true."""

    def on_end(self, state):
        """After the last epoch."""


class Hooks:
    """Call a list of hooks in their order: hooks("on_step", state). Their order does not matter to the training.

    A file that cannot be written stops no run, unless a hook that runs everywhere wanted it. Any other error of a hook
    ends the run, with the hook's name.
    """

    def __init__(self, hooks):
        self.hooks = [hook for hook in hooks if hook.everywhere or utils.is_main_process()]

    def __call__(self, event, state):
        for hook in self.hooks:
            try:
                with contextlib.nullcontext() if hook.everywhere else AloneOnMainProcess():
                    getattr(hook, event)(state)
            except (UserError, utils.TrainingError, utils.Stopped):
                raise
            except Exception as error:
                if hook.everywhere or not isinstance(error, OSError):
                    where = f"{event}, epoch {state.epoch}, step {state.step}"
                    raise RuntimeError(f"hook {type(hook).__name__} failed ({where}): {error!r}") from error
                print(f"{type(hook).__name__} failed: {error}. Training goes on.", flush=True)
                if event == "on_start":  # it has not what it needs
                    self.hooks = [other for other in self.hooks if other is not hook]


class AloneOnMainProcess(TorchDispatchMode):
    """Within, a collective operation raises, where it would wait for ever for processes that do not take part."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ("c10d", "_c10d_functional"):
            raise RuntimeError(f"{function} on the main process alone: set `everywhere = True` in the hook")
        return function(*args, **(kwargs or {}))


class AveragedWeights(Hook):
    """Exponential moving average of the weights, `state.model_ema`, after every step."""

    everywhere = True

    def on_step(self, state):
        state.model_ema.update(state.model)


class UnreadableImages(Hook):
    """Name each image that could not be read, once, and stop the run when there are more than max_bad_images."""

    everywhere = True  # all know the same names, so all stop together

    def __init__(self, max_bad_images):
        self.max_bad_images = max_bad_images

    def on_start(self, state):
        self.told = len(state.unreadable_images)

    def on_evaluate(self, state):
        self.on_log(state)

    def on_log(self, state):
        names = list(state.unreadable_images)
        for number, name in enumerate(names[self.told :], start=self.told + 1):
            utils.log(f"unreadable image {number} (of --max_bad_images {self.max_bad_images}), left out: {name}")
        self.told = len(names)
        if self.told > self.max_bad_images:
            raise UserError(f"{self.told} images could not be read, --max_bad_images is {self.max_bad_images}")


class Console(Hook):
    """A line for each log interval, and what is measured at the end of an epoch."""

    SHOWN = ("train_", "test_", "images_per_second")  # beginnings of the names of metrics in other lines

    def on_start(self, state):
        self.started, self.start = time.perf_counter(), state.epochs_done

    def on_log(self, state):
        epochs, steps = state.args.epochs, state.steps_per_epoch
        left = (epochs - state.epochs_done) / (state.epochs_done - self.start) * (time.perf_counter() - self.started)
        rate = state.images_per_second
        line = (
            f"epoch {state.epoch:>{len(str(epochs))}}/{epochs}  step {state.step:>{len(str(steps))}}/{steps}"
            f"  loss {state.loss:.4f} (epoch {state.epoch_loss.value:.4f})  lr {state.lr:.2e}"
            f"  {rate:.{0 if rate >= 10 else 2}f} img/s  data {state.data_seconds:.3f} s/batch  eta {hours(left)}"
        )
        if state.device_type == "cuda":
            line += f"  memory {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB"
        print(line, flush=True)

    def on_epoch_end(self, state):
        for what, evaluation in state.evaluations.items():
            print(f"{'averaged weights' if what else 'evaluation'}: {evaluation}", flush=True)
        others = {name: value for name, value in state.metrics.items() if not name.startswith(self.SHOWN)}
        if others:
            print("  ".join(f"{name} {value:.4g}" for name, value in others.items()), flush=True)
        for name, (value, epoch, since) in state.best.items():
            if not since or name in state.metrics:
                print(f"best {name} so far: {value:.4g}, epoch {epoch}", flush=True)

    def on_end(self, state):
        early = "" if state.epoch == state.args.epochs else f", ended early: no better {state.args.watch}"
        trained = f"trained {state.epochs_done - self.start:.4g} epochs"
        print(f"{trained} in {hours(time.perf_counter() - self.started)}{early}", flush=True)


def hours(seconds):
    """h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


class LogFile(Hook):
    """log.txt in the output folder: one JSON object an epoch. It is rewritten whole, so a full disk costs no line."""

    def __init__(self, output_dir):
        self.path = Path(output_dir) / "log.txt"
        self.lines = []

    def on_start(self, state):
        """Take back the lines of epochs that are trained again since no checkpoint of them was kept."""
        if self.path.exists():
            lines = self.path.read_text(errors="surrogateescape").splitlines()
            self.lines = [line for line in lines if not self.is_of_epoch_from(state.epoch, line)]

    @staticmethod
    def is_of_epoch_from(epoch, line):
        try:
            return json.loads(line)["epoch"] >= epoch
        except (ValueError, KeyError, TypeError):
            return False  # not a line of ours

    def on_epoch_end(self, state):
        self.lines.append(json.dumps(state.metrics | {"epoch": state.epoch, "n_parameters": state.n_parameters}))
        content = "".join(f"{line}\n" for line in self.lines).encode(errors="surrogateescape")
        utils.write_whole(self.path, lambda file: file.write(content))


class TensorBoard(Hook):
    """Scalars for each log interval; the step axis is 1000 x epochs done."""

    def __init__(self, log_dir):
        self.log_dir = log_dir

    def on_start(self, state):
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        # What an earlier process of this run wrote beyond its last checkpoint is taken back.
        beyond = None if state.evaluating else int(1000 * state.epochs_done) + 1
        state.writer = self.writer = SummaryWriter(self.log_dir, purge_step=beyond)

    def on_log(self, state):
        at = int(1000 * state.epochs_done)
        self.writer.add_scalar("train/loss", state.loss, at)
        self.writer.add_scalar("train/lr", state.lr, at)
        self.writer.add_scalar("train/images_per_second", state.images_per_second, at)

    def on_epoch_end(self, state):
        for name, value in state.metrics.items():
            kind, _, rest = name.partition("_")
            tag = f"{kind}/{rest}" if kind in ("test", "probe") else f"epoch/{name}"
            self.writer.add_scalar(tag, value, 1000 * state.epochs_evaluated)
        self.writer.flush()

    def on_end(self, state):
        self.writer.close()


class Reconstructions(Hook):
    """Every `every` epochs, and after the first and the last, a picture of the same images' reconstructions."""

    def __init__(self, dataset, output_dir, every, count=8):
        self.dataset, self.output_dir, self.every, self.count = dataset, output_dir, every, count

    def on_epoch_end(self, state):
        if not state.due(self.every):
            return
        count = min(self.count, len(self.dataset.images))
        numbers = [i * len(self.dataset.images) // count for i in range(count)]
        batch = Batch.collate([self.dataset[0, number] for number in numbers])
        device = state.args.device
        picture = reconstruct(state.model, batch.imgs.to(device), state.args.mask_ratio, batch.noise.to(device))
        picture.save(Path(self.output_dir) / f"reconstruction-{state.epoch:04}.png")
        add_picture(state, "reconstruction", picture, 1000 * state.epochs_evaluated)


def add_picture(state, title, picture, at):
    """Show a Pillow RGB image in TensorBoard, if that is on."""
    if getattr(state, "writer", None):
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        state.writer.add_image(title, pixels.view(picture.height, picture.width, 3), at, dataformats="HWC")
        state.writer.flush()


class ClassReport(Hook):
    """After the last evaluation: precision, recall and confusion of the classes, as CSV files and a picture."""

    LARGEST = 2000  # classes of a confusion matrix: it takes their square

    def __init__(self, output_dir):
        self.folder = Path(output_dir)

    def on_epoch_end(self, state):
        if not state.evaluating and not state.ends_before(state.epoch + 1):
            return
        names = state.class_names
        for what, evaluation in state.evaluations.items():
            columns = evaluation.per_class()
            rounded = [c.round(decimals=4) if c.is_floating_point() else c for c in columns.values()]
            rows = zip(names, *(column.tolist() for column in rounded), strict=True)
            self.write(f"per_class{what}.csv", ("class", *columns), rows)
            if len(names) > self.LARGEST:
                print(f"no confusion matrix: {len(names)} classes are more than {self.LARGEST}", flush=True)
                continue
            matrix = evaluation.confusion()
            rows = [(name, *counts) for name, counts in zip(names, matrix.tolist(), strict=True)]
            self.write(f"confusion{what}.csv", ("true class \\ predicted", *names), rows)
            picture = draw_confusion(matrix, names)
            picture.save(self.folder / f"confusion{what}.png")
            add_picture(state, f"confusion{what}", picture, 1000 * state.epochs_evaluated)

    def write(self, name, titles, rows):
        file = io.StringIO()
        csv.writer(file).writerows([titles, *rows])
        content = file.getvalue().encode(errors="surrogateescape")
        utils.write_whole(self.folder / name, lambda file: file.write(content))


class Profiler(Hook):
    """torch's profiler over some optimizer steps of this process: a trace for TensorBoard and Perfetto, and a table."""

    def __init__(self, steps, folder):
        self.first, self.end = steps
        self.path = Path(folder) / f"profile-{self.first}-{self.end}.pt.trace.json.gz"
        self.done, self.profile = 0, None

    def on_start(self, state):
        self.on_gpu = state.device_type == "cuda"
        self.start_or_stop()

    def on_step(self, state):
        self.done += 1
        self.start_or_stop()

    def start_or_stop(self):
        if self.done == self.first:
            self.profile = torch.profiler.profile(record_shapes=True)
            self.profile.start()
        elif self.done == self.end:
            self.write()

    def write(self):
        profile, self.profile = self.profile, None
        profile.stop()
        profile.export_chrome_trace(str(self.path))
        print(
            f"steps {self.first} to {min(self.done, self.end) - 1}, traced in {self.path}: time by operation",
            flush=True,
        )
        print("\n".join(self.table(profile.key_averages())), flush=True)

    def table(self, operations, rows=10):
        """Lines: part of the time, on the GPU of its kernels, milliseconds, calls and name of the slowest."""
        timer = "self_cpu_time_total"
        if self.on_gpu:
            timer = "self_device_time_total"
            kernels = [o for o in operations if o.device_type == torch.autograd.DeviceType.CUDA]
            operations = [kernel for kernel in kernels if not kernel.is_user_annotation]
        slowest = sorted(operations, key=lambda operation: -getattr(operation, timer))
        total = sum(getattr(operation, timer) for operation in operations) or 1
        for operation in slowest[:rows]:
            time = getattr(operation, timer)  # microseconds
            yield f"  {time / total:6.1%} {time / 1e3:10.1f} ms {operation.count:7} x  {operation.key}"

    def on_end(self, state):
        if self.profile is not None:
            self.write()
        elif self.done < self.first:
            print(f"--profile_steps {self.first}:{self.end}: nothing traced, there were {self.done} steps", flush=True)


class Checkpointer(Hook):
    """A checkpoint every save_ckpt_freq epochs, after the last one, and every save_ckpt_steps steps within an epoch.

    And one after each epoch that was the best by args.watch: checkpoint-best.pth, or checkpoint-best-ema.pth by
    averaged weights, with encoder-best.pth or encoder-best-ema.pth, the bare weights of the backbone.
    """

    everywhere = True  # reading the losses takes all processes

    written = None  # what was written last, by the main process

    def on_step(self, state):
        every = state.args.save_ckpt_steps
        if every and state.step % every == 0 and state.step != state.steps_per_epoch:
            self.save(state, step=state.step)

    def on_epoch_end(self, state):
        for name in filter(state.is_best, state.watched()):
            self.save(state, name="best-ema" if name.endswith("_ema") else "best")
        if (state.epoch + 1) % state.args.save_ckpt_freq == 0 or state.ends_before(state.epoch + 1):
            self.save(state)

    def save(self, state, last=False, **which):
        """Write a checkpoint, if it is not there yet.

        Raises TrainingError if the weights are lost, or if it cannot be written and the run ends here (last).
        """
        state.read_losses()
        if not torch.nn.utils.get_total_norm(state.model.parameters()).isfinite():
            raise utils.TrainingError(
                f"weights are not finite after step {state.step} of epoch {state.epoch}: stopped. "
                "The last checkpoint is from before. A lower --blr or --amp_dtype bfloat16 may help"
            )
        if last or not which and state.ends_before(state.epoch + 1):
            return utils.on_main_process(lambda: self.write_last(state, which))
        if not utils.on_main_process(lambda: self.try_to_write(state, which)) and "name" in which:
            state.best = state.best_before  # what is on disk

    def try_to_write(self, state, which):
        """Whether it succeeded."""
        try:
            self.write(state, which)
        except OSError as error:
            utils.log(
                f"checkpoint not saved: {error}. Those before it are kept; the next save tries again, training goes on."
            )
            return False
        return True

    def write(self, state, which):
        """On the main process. Raises OSError."""
        now = (state.epoch, which)
        if self.written != now:
            run = (state.args, state.epoch, None, state.model, state.optimizer, state.scaler, state.model_ema)
            utils.save_model(*run, **which, **state.progress())
            if "name" in which:
                self.write_encoder(state, which["name"])
            self.written = now

    def write_encoder(self, state, name):
        model = state.model_ema.module if name.endswith("ema") else state.model
        weights, _ = split_decoder(model.state_dict())
        encoder = {key: value for key, value in weights.items() if not key.startswith(("norm.", "head."))}
        utils.save_whole(Path(state.args.output_dir) / f"encoder-{name}.pth", {"model": encoder})

    def write_last(self, state, which):
        try:
            self.write(state, which)
        except OSError as error:
            raise utils.TrainingError(f"the last checkpoint could not be saved: {error}") from None


def saving_hooks(args):
    """What keeps a run from being lost, as far as args.save_ckpt lets it."""
    checkpointer = Checkpointer() if args.output_dir and args.save_ckpt else None
    return ([checkpointer] if checkpointer else []) + [StopOnSignal(checkpointer)]


class StopOnSignal(Hook):
    """After a signal that a scheduler sends before it takes the machine: save and stop, on all processes at one step.

    The signal is only noted; what is under way is finished first, so nothing is cut short, however many signals come.
    Processes ask each other every `PATIENCE` seconds or so, not every step. Raises `utils.Stopped`.
    """

    everywhere = True
    PATIENCE = 2.0

    def __init__(self, checkpointer=None):
        self.checkpointer = checkpointer
        self.received = 0  # the number of the signal
        self.every = self.left = 1  # steps from one question to the next, and those left

    def on_start(self, state):
        self.before = {signum: signal.signal(signum, self.note) for signum in utils.STOP_SIGNALS}
        self.asked = time.perf_counter()
        state.stop_requested = lambda: bool(self.received)

    def note(self, signum, frame):
        self.received = self.received or signum

    def on_step(self, state):
        self.left -= 1
        if self.left <= 0 or state.step == state.steps_per_epoch:
            self.stop_if_asked(state, step=state.step)

    def on_evaluate(self, state):
        """What was given up leaves nothing: it is made anew when the run goes on."""
        if state.given_up:
            self.stop_if_asked(state, step=state.step)

    def on_epoch_end(self, state):
        self.stop_if_asked(state)

    def stop_if_asked(self, state, **which):
        received = self.agree()
        if not received:
            return
        if self.checkpointer is not None:
            self.checkpointer.save(state, last=True, **which)
        requeue = self.before[received] if received != signal.SIGTERM else None
        # from here on signals are still noted, and change nothing
        raise utils.Stopped(received, self.checkpointer is not None, requeue if callable(requeue) else None)

    def agree(self):
        """The signal that any process has got, or 0, the same on all; they must call it at the same step."""
        if not dist.is_initialized():
            return self.received
        now = time.perf_counter()
        facts = torch.tensor([self.received, now - self.asked], dtype=torch.float64)
        dist.all_reduce(facts, dist.ReduceOp.MAX)
        received, seconds = facts.tolist()
        self.asked = now
        self.left = self.every = max(1, min(2 * self.every, int(self.every * self.PATIENCE / seconds)))
        return int(received)

    def on_end(self, state):
        for signum, handler in self.before.items():
            signal.signal(signum, handler)
