"""Observers of a run: log lines, TensorBoard, pictures, tables, profiles, probes.

A hook reads the `Run` and does not change the training. A number of a step goes to `run.observe(name=value)`, one of an
epoch into `run.metrics`: both then reach the console, log.txt and TensorBoard. To add a hook, write a class and put it
into the list in `build_hooks` of `main_pretrain.py` or `main_finetune.py`, anywhere; README.md has an example.
"""

import argparse
import datetime
import json
import math
import re
import time
from pathlib import Path

import torch

import checkpoints
import utils
from datasets import Batch
from evaluation import draw_confusion, draw_reconstructions, probe
from flags import at_least
from image_sets import spread
from images import statistics_of
from run import Hook, Hooks  # noqa: F401  (hooks.Hook, hooks.Hooks: what a hook is)
from utils import UserError, log


def add_log_args(parser):
    add = parser.add_argument_group("logs").add_argument
    add("--log_dir", metavar="FOLDER", help="for TensorBoard; None: the output folder")
    add("--print_freq", default=20, type=at_least(1), help="optimizer steps between log lines")
    traced = "trace optimizer steps A to B - 1 of this process, counted from 0; None: no trace"
    add("--profile_steps", type=step_range, metavar="A:B", help=traced)


def step_range(text):
    """Argument type of A:B."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not two step numbers A:B, the first below the second")
    return int(match[1]), int(match[2])


def check_log_args(args):
    if args.profile_steps and not args.output_dir:
        raise UserError("--profile_steps {}:{}: give an --output_dir too".format(*args.profile_steps))


def build_loggers(args, training=True):
    """The hooks of both scripts that log; training: also those that an evaluation has no use for."""
    loggers = [UnreadableImages(), Console()]
    if args.output_dir and training:
        loggers.append(LogFile(args.output_dir))
    if args.log_dir or args.output_dir:
        loggers.append(TensorBoard(args.log_dir or args.output_dir))
    if args.profile_steps and training:
        loggers.append(Profiler(args.profile_steps, args.output_dir))
    return loggers


# ---------------------------------------------------------------- training


class UpdateEMA(Hook):
    """Update the exponential moving average of the weights, `run.model_ema`, after every step."""

    def on_step(self, run):
        run.model_ema.update(run.model)


class UnreadableImages(Hook):
    """Name each image that could not be read, once, and stop the run at more than --max_bad_images, on all ranks."""

    def on_start(self, run):
        self.reported = len(run.unreadable_images)

    def on_log(self, run):
        names, most = list(run.unreadable_images), run.args.max_bad_images
        for number, name in enumerate(names[self.reported :], start=self.reported + 1):
            log(f"unreadable image {number} (of --max_bad_images {most}), left out: {name}")
        self.reported = len(names)
        if self.reported > most:
            raise UserError(f"{self.reported} images could not be read, --max_bad_images is {most}")

    on_evaluate = on_log


class Probe(Hook):
    """Every --probe_freq epochs of pre-training, and after the first and the last, probe the encoder's features.

    And before the first step, for comparison: an untrained encoder's features are not useless.
    loaders: of labeled images to fit on and to judge by, see `evaluation.probe`.
    """

    def __init__(self, loaders):
        self.loaders = loaders

    def on_start(self, run):
        fit, test = (len(loader.images) for loader in self.loaders)
        gigabytes = (fit + test) * run.model.encoder.dims[-1] * 4 / 2**30
        log(f"probe: fits on {fit} images, tests on {test}; features of {gigabytes:.2g} GiB, on the main rank")

    def on_epoch_start(self, run):
        if run.epochs_done == 0 and (result := self.measure(run)):
            log("untrained encoder: " + "  ".join(f"{name} {value:.4g}" for name, value in result[0].items()))

    def on_evaluate(self, run):
        if not run.is_due(run.args.probe_freq):
            return
        if result := self.measure(run):
            run.metrics |= result[0]
            run.add_unreadable(result[2])
        else:
            run.interrupted = True

    def measure(self, run):
        run.model.eval()
        result = probe(
            run.model.encode_all, self.loaders, run.device, lambda: utils.autocast(run.args, run.device),
            run.stop_requested, max_seconds=run.args.dist_timeout / 2, statistics=statistics_of(run.args),
        )  # fmt: skip
        run.model.train()
        return result


# ---------------------------------------------------------------- logs


class Console(Hook):
    """A line for each log interval, and the metrics at the end of an epoch."""

    main_only = True
    PLACED = ("loss", "images_per_second", "data_seconds")  # have their places in a log line
    REPORTED = ("train_", "test_", "images_per_second")  # prefixes of metrics that other lines report

    def on_start(self, run):
        self.started, self.start = time.perf_counter(), run.epochs_done

    def on_log(self, run):
        epochs, steps, lap = run.args.epochs, run.steps_per_epoch, run.lap
        left = (epochs - run.epochs_done) / (run.epochs_done - self.start) * (time.perf_counter() - self.started)
        rate = lap["images_per_second"]
        others = "".join(f"  {name} {value:.4g}" for name, value in lap.items() if name not in self.PLACED)
        line = (
            f"epoch {run.epoch:>{len(str(epochs))}}/{epochs}  step {run.step:>{len(str(steps))}}/{steps}"
            f"  loss {lap['loss']:.4f} (epoch {run.epoch_means.values()['loss']:.4f}){others}  lr {run.lr:.2e}"
            f"  {rate:.{0 if rate >= 10 else 2}f} img/s  data {lap['data_seconds']:.3f} s/batch"
            f"  eta {datetime.timedelta(seconds=round(left))}"
        )
        if run.device.type == "cuda":
            line += f"  memory {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB"
        log(line)

    def on_epoch_end(self, run):
        for suffix, evaluation in run.evaluations.items():
            log(f"{'EMA weights' if suffix else 'evaluation'}: {evaluation}")
        others = {name: value for name, value in run.metrics.items() if not name.startswith(self.REPORTED)}
        if others:
            log("  ".join(f"{name} {value:.4g}" for name, value in others.items()))
        for name, (value, epoch, since) in run.best.items():
            if not since or name in run.metrics:
                log(f"best {name} so far: {value:.4g}, epoch {epoch}")

    def on_end(self, run):
        early = "" if run.epoch == run.args.epochs else f", stopped early: no better {run.watched[0]}"
        seconds = round(time.perf_counter() - self.started)
        log(f"trained {run.epochs_done - self.start:.4g} epochs in {datetime.timedelta(seconds=seconds)}{early}")


class LogFile(Hook):
    """args.json, all flags, and log.txt, one JSON object an epoch, rewritten whole: a full disk costs no line."""

    main_only = True

    def __init__(self, output_dir):
        self.path = Path(output_dir) / "log.txt"
        self.lines = []

    def on_start(self, run):
        """Write the flags, and drop the lines of epochs that are trained again, as no checkpoint of them was kept."""
        flags = json.dumps(vars(run.args), indent=1, sort_keys=True)
        checkpoints.write_text(self.path.with_name("args.json"), flags)
        if self.path.exists():
            lines = self.path.read_text(errors="surrogateescape").splitlines()
            self.lines = [line for line in lines if not self.is_from_epoch(run.epoch, line)]

    @staticmethod
    def is_from_epoch(epoch, line):
        """Whether a line is of this epoch or a later one."""
        try:
            return json.loads(line)["epoch"] >= epoch
        except (ValueError, KeyError, TypeError):
            return False  # not a line of ours

    def on_epoch_end(self, run):
        facts = run.metrics | {"epoch": run.epoch, "n_parameters": run.n_parameters}
        unknown = {name for name, value in facts.items() if isinstance(value, float) and not math.isfinite(value)}
        self.lines.append(json.dumps(facts | dict.fromkeys(unknown)))  # JSON has no nan: null
        checkpoints.write_text(self.path, "".join(f"{line}\n" for line in self.lines))


class TensorBoard(Hook):
    """Scalars for each log interval and epoch; the step axis is 1000 x epochs done.

    What cannot be written is kept and written with what follows, by a new writer: torch's never works again.
    """

    main_only = True
    writer = None

    def __init__(self, log_dir):
        self.log_dir, self.unwritten = log_dir, []  # calls of a writer's method: its name and arguments

    def on_start(self, run):
        # What an earlier process of this run wrote beyond its last checkpoint is dropped.
        self.beyond = None if run.evaluating else int(1000 * run.epochs_done) + 1
        run.add_picture = self.add_picture
        self.write()

    def on_log(self, run):
        for name, value in (run.lap | {"lr": run.lr}).items():
            self.unwritten.append(("add_scalar", f"train/{name}", value, int(1000 * run.epochs_done)))
        self.write()

    def on_epoch_end(self, run):
        for name, value in run.metrics.items():
            kind, _, rest = name.partition("_")
            tag = f"{kind}/{rest}" if kind in ("test", "probe") else f"epoch/{name}"
            self.unwritten.append(("add_scalar", tag, value, int(1000 * run.epochs_done)))
        self.write()

    def add_picture(self, run, title, picture):
        """Show a Pillow RGB image."""
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        pixels = pixels.view(picture.height, picture.width, 3)
        self.unwritten.append(("add_image", title, pixels, int(1000 * run.epochs_done), None, "HWC"))
        self.write()

    def write(self):
        """Raises OSError."""
        from torch.utils.tensorboard import SummaryWriter

        try:
            if self.writer is None:
                self.writer = SummaryWriter(self.log_dir, purge_step=self.beyond)
            for method, *values in self.unwritten:
                getattr(self.writer, method)(*values)
            self.writer.flush()
            self.unwritten, self.beyond = [], None
        except OSError:
            self.writer = None
            raise

    def on_end(self, run):
        self.write()
        self.writer.close()


def save_picture(run, stem, picture):
    """Write a Pillow RGB image whole, as STEM.png in the output folder, and show it in TensorBoard, if that is on."""
    checkpoints.write_whole(Path(run.args.output_dir) / f"{stem}.png", lambda file: picture.save(file, "PNG"))
    run.add_picture(run, re.sub(r"-\d+$", "", stem), picture)


# ---------------------------------------------------------------- pictures, tables, profiles


class Reconstructions(Hook):
    """Every --picture_freq epochs, and after the first and the last, a picture of the same images' reconstructions."""

    main_only = True

    def __init__(self, dataset):
        self.dataset = dataset

    def on_epoch_end(self, run):
        if not run.is_due(run.args.picture_freq):
            return
        batch = Batch.collate([self.dataset[0, index, 0] for index in spread(range(len(run.images)), 8)])
        imgs, noise = batch.imgs.to(run.device), batch.noise.to(run.device)
        picture = draw_reconstructions(run.model, imgs, noise, statistics=statistics_of(run.args))
        save_picture(run, f"reconstruction-{run.epoch:04}", picture)


class ClassReport(Hook):
    """After the last evaluation: metrics of each class or target, and confusion, as CSV files and a picture."""

    main_only = True
    MAX_CLASSES = 2000  # of a confusion matrix, whose size is the square

    def on_epoch_end(self, run):
        if not run.evaluating and not run.is_last_epoch():
            return
        for suffix, evaluation in run.evaluations.items():
            columns = evaluation.per_class()
            rounded = [c.round(decimals=4) if c.is_floating_point() else c for c in columns.values()]
            rows = zip(*(column.tolist() for column in rounded), strict=True)
            self.write_table(run, f"per_{evaluation.unit}{suffix}", [evaluation.unit, *columns], rows)
            if evaluation.confusion is None:
                continue
            if len(run.class_names) > self.MAX_CLASSES:
                log(f"no confusion matrix: {len(run.class_names)} classes are more than {self.MAX_CLASSES}")
            else:
                matrix, titles = evaluation.confusion(), ["true class \\ predicted", *run.class_names]
                self.write_table(run, f"confusion{suffix}", titles, matrix.tolist())
                save_picture(run, f"confusion{suffix}", draw_confusion(matrix, run.class_names))

    def write_table(self, run, stem, titles, rows):
        """STEM.csv in the output folder, a row for each class."""
        rows = [(name, *numbers) for name, numbers in zip(run.class_names, rows, strict=True)]
        path = Path(run.args.output_dir) / f"{stem}.csv"
        checkpoints.write_whole(path, lambda file: checkpoints.write_csv(file, [titles, *rows]))


class Profiler(Hook):
    """torch's profiler over some optimizer steps of this process: a trace for TensorBoard and Perfetto, and a table."""

    main_only = True

    def __init__(self, steps, folder):
        self.first, self.end = steps
        self.path = Path(folder) / f"profile-{self.first}-{self.end}.pt.trace.json.gz"
        self.done, self.profile = 0, None

    def on_start(self, run):
        self.on_gpu = run.device.type == "cuda"
        self.start_or_stop()

    def on_step(self, run):
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
        log(f"steps {self.first} to {min(self.done, self.end) - 1}, traced in {self.path}: time by operation")
        timer = "self_device_time_total" if self.on_gpu else "self_cpu_time_total"
        log(profile.key_averages().table(sort_by=timer, row_limit=10, max_name_column_width=40))

    def on_end(self, run):
        if self.profile is not None:
            self.write()
        elif self.done < self.first:
            log(f"--profile_steps {self.first}:{self.end}: nothing traced, there were {self.done} steps")
