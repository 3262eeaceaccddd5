"""What happens around training: log lines, TensorBoard, pictures, checkpoints.

A hook reads the `RunState` and never changes the training. To add one, write a class and put it into the list in
`main_pretrain.py` or `main_finetune.py`:

    class GradientNorm(Hook):
        def on_step(self, state):
            print(state.epoch, state.step, ...)
"""

import contextlib
import csv
import io
import json
import math
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw

import utils
from datasets import Batch, denormalize, normalize
from models.checkpoints import get_weights, load_weights, remap_checkpoint_keys


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
    """Where a run stands: what hooks read and checkpoints keep. The same on every process but for its own images."""

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
        self.evaluations = {}  # the last ones, by what was evaluated: "" the model, "_ema" the averaged weights
        self.best = {}  # likewise: [top-1 accuracy, epoch]
        self.evaluating = getattr(args, "eval", False)  # and nothing else
        self.device_type = torch.device(args.device).type
        self.n_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.epoch = args.start_epoch
        self.step = 0  # optimizer steps done in this epoch
        self.lr = 0.0
        self.epoch_loss = Mean()  # of this epoch's losses, as far as they were read
        self.lap_loss = Mean()  # of those since the last log line
        self.unread_losses = []  # tensors on the device
        self.unreadable_images = {}  # names that all processes met, in order
        self.unread_names = []  # those that this one met since
        self.stop_requested = lambda: False  # whether to give up what can be made again
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

    def start_lap(self):
        """Start the clock: what is logged is measured from one log line to the next."""
        self.clock = self.lap_start = time.perf_counter()
        self.data_time, self.batches = 0.0, 0
        self.lap_loss = Mean()

    def end_lap(self):
        """Set what is logged: loss, images_per_second, data_seconds (waited for a batch). On all processes at once."""
        self.read_losses()
        images = self.batches * self.args.batch_size * utils.get_world_size()
        self.images_per_second = images / (time.perf_counter() - self.lap_start)
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
        return [self.images.name(index) for index in self.sampler.part(self.sampler.order(self.epoch), batch)]

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
        """Keep the evaluations of an epoch, and which is the best; none of them if one was given up."""
        self.evaluations = evaluations = {} if None in evaluations.values() else evaluations
        for what, evaluation in evaluations.items():
            if what not in self.best or evaluation.acc1 > self.best[what][0]:
                self.best[what] = [evaluation.acc1, self.epoch]
            self.unreadable_images |= dict.fromkeys(evaluation.unreadable)

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
        flags = [{name: group[name] for name in ("weight_decay", "lr_scale")} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        for group, now in zip(self.optimizer.param_groups, flags, strict=True):
            group.update(now)  # the flags of now, with the moments of then
        self.scaler.load_state_dict(checkpoint["scaler"])
        self.epoch, self.step = checkpoint["epoch"], checkpoint["step"]
        if self.step:
            self.epoch_loss, self.lr = Mean(*checkpoint["epoch_loss"]), checkpoint["lr"]
        self.unreadable_images = dict.fromkeys(checkpoint["unreadable_images"])
        self.best = checkpoint["best"]

    def end_epoch(self):
        self.epoch, self.step = self.epoch + 1, 0
        self.epoch_loss = Mean()


def resume(state, run_flags):
    """Stand where the run stopped, on all processes at the same step: see `go_on`."""
    utils.on_all_processes(lambda: go_on(state, run_flags))
    if dist.is_initialized():
        positions = [None] * dist.get_world_size()
        dist.all_gather_object(positions, (state.epoch, state.step))
        if len(set(positions)) > 1:
            raise utils.UserError(
                f"--output_dir {state.args.output_dir}: the processes find other checkpoints there, "
                f"of (epoch, step) {sorted(set(positions))}: it must be one folder for all machines"
            )


def go_on(state, run_flags):
    """Go on from the newest whole checkpoint in the output folder, else start from --resume, else from nothing.

    run_flags: names of what decides a run's numbers; what has changed is told, and refused where it cannot be.
    """
    args = state.args
    checkpoint, path = utils.newest_checkpoint(args.output_dir) if args.output_dir else (None, None)
    if checkpoint is None and args.resume:
        checkpoint, path = utils.load_checkpoint(args.resume), args.resume
    if checkpoint is None:
        return
    load_model_and_ema(state, checkpoint, path)
    if checkpoint.get("format") is None:
        return utils.log(
            f"weights from {path}, which another program wrote: training starts at epoch {args.start_epoch}"
        )
    now = vars(args) | {"num_images": state.num_images}
    try:
        then = checkpoint["args"] | {"num_images": checkpoint["num_images"]}
        refuse_what_cannot_change(state, checkpoint, then, now, path)
        state.restore(checkpoint)
    except KeyError as error:
        raise utils.UserError(f"{path}: a checkpoint without {error}: cannot be gone on from") from None
    except ValueError as error:  # of the optimizer: other groups, as another layer decay makes
        names = [name for name in ("layer_decay", "layer_decay_type") if then.get(name) != now.get(name)]
        flags = " ".join(f"--{name} {then.get(name)}" for name in names)
        raise utils.UserError(f"{path}: saved with {flags or 'another optimizer'}; take the same: {error}") from None
    for name in run_flags:
        if then.get(name) != now[name]:
            utils.log(f"changed since {path}: {name} {then.get(name)} -> {now[name]}")
    utils.log(f"goes on from {path}: epoch {state.epoch}, step {state.step}")


def load_model_and_ema(state, checkpoint, path):
    """Load a checkpoint's weights, and the averaged ones, if they are kept; without any they start from the others."""
    load_weights(state.model, get_weights(checkpoint, path), path)
    if state.model_ema is None:
        return
    if "model_ema" in checkpoint:
        load_weights(state.model_ema.module, remap_checkpoint_keys(checkpoint["model_ema"]), path)
    else:
        state.model_ema.set(state.model)
        utils.log(f"{path} holds no averaged weights: they start from the others")


def refuse_what_cannot_change(state, checkpoint, then, now, path):
    """Raise UserError for what would make nonsense of the optimizer's state or of the position in the epoch."""
    if then.get("opt") != now.get("opt"):
        raise utils.UserError(f"{path}: saved with --opt {then.get('opt')}; can only go on with the same")
    if checkpoint["class_names"] != state.class_names:
        raise utils.UserError(f"{path}: {other_classes(checkpoint['class_names'], state.class_names)}")
    for name in ("effective_batch_size", "num_images"):
        if checkpoint["step"] and then[name] != now[name]:
            raise utils.UserError(
                f"{path}: saved within an epoch at {name.replace('_', ' ')} {then[name]}; "
                f"can only go on with the same, not {now[name]}"
            )


def other_classes(then, now):
    """What differs between the classes of a checkpoint and those of the data."""
    then, now = (list(names or []) for names in (then, now))
    if len(then) != len(now):
        return f"has {len(then)} classes, the data {len(now)}"
    name = next(i for i in range(len(now)) if then[i] != now[i])
    return f"has other classes than the data: number {name} is {then[name]!r}, not {now[name]!r}"


class Hook:
    """Called at set points of a run with its `RunState`; by default on the main process only."""

    everywhere = False  # True: on every process. What a hook does there must be the same on each.

    def on_start(self, state):
        """Before the first epoch of this process."""

    def on_epoch_start(self, state): ...

    def on_step(self, state):
        """After an optimizer step; `state.step` counts it already."""

    def on_log(self, state):
        """Every print_freq steps and after the last step of an epoch, before `on_step`."""

    def on_evaluate(self, state):
        """After `state.evaluations` were made, at the end of an epoch or with --eval true."""

    def on_epoch_end(self, state):
        """After the last step of an epoch and its evaluation; `state.epoch` is that epoch."""

    def on_end(self, state):
        """After the last epoch."""


class Hooks:
    """Call a list of hooks in their order: hooks("on_step", state). A file that cannot be written stops no run."""

    def __init__(self, hooks):
        self.hooks = [hook for hook in hooks if hook.everywhere or utils.is_main_process()]

    def __call__(self, event, state):
        for hook in self.hooks:
            try:
                getattr(hook, event)(state)
            except OSError as error:
                print(f"{type(hook).__name__} failed: {error}. Training goes on.", flush=True)
                if event == "on_start":  # it has not what it needs
                    self.hooks = [other for other in self.hooks if other is not hook]


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
            raise utils.UserError(f"{self.told} images could not be read, --max_bad_images is {self.max_bad_images}")


class Console(Hook):
    """A line for each log interval."""

    def on_start(self, state):
        self.started, self.start = time.perf_counter(), state.epochs_done

    def on_log(self, state):
        epochs, steps = state.args.epochs, state.steps_per_epoch
        left = (epochs - state.epochs_done) / (state.epochs_done - self.start) * (time.perf_counter() - self.started)
        line = (
            f"epoch {state.epoch:>{len(str(epochs))}}/{epochs}  step {state.step:>{len(str(steps))}}/{steps}"
            f"  loss {state.loss:.4f} (epoch {state.epoch_loss.value:.4f})  lr {state.lr:.2e}"
            f"  {state.images_per_second:.0f} img/s  data {state.data_seconds:.3f} s/batch  eta {hours(left)}"
        )
        if state.device_type == "cuda":
            line += f"  memory {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB"
        print(line, flush=True)

    def on_evaluate(self, state):
        for what, evaluation in state.evaluations.items():
            line = f"{'averaged weights' if what else 'evaluation'}: {evaluation}"
            if not state.evaluating:
                line += "  (best {:.2f} %, epoch {})".format(*state.best[what])
            print(line, flush=True)

    def on_end(self, state):
        print(
            f"trained {state.epochs_done - self.start:.4g} epochs in {hours(time.perf_counter() - self.started)}",
            flush=True,
        )


def hours(seconds):
    """h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def named_metrics(state, prefix):
    """loss, acc1 and acc5 of the last evaluations by name."""
    return {
        f"{prefix}{name}{what}": getattr(evaluation, name)
        for what, evaluation in state.evaluations.items()
        for name in ("loss", "acc1", "acc5")
    }


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
        entry = {
            "train_loss": state.epoch_loss.value,
            "train_lr": state.lr,
            **named_metrics(state, "test_"),
            "epoch": state.epoch,
            "n_parameters": state.n_parameters,
        }
        self.lines.append(json.dumps(entry))
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

    def on_evaluate(self, state):
        for name, value in named_metrics(state, "test/").items():
            self.writer.add_scalar(name, value, 1000 * state.epochs_evaluated)
        self.writer.flush()

    def on_epoch_end(self, state):
        self.writer.add_scalar("epoch/train_loss", state.epoch_loss.value, 1000 * (state.epoch + 1))
        self.writer.flush()

    def on_end(self, state):
        self.writer.close()


class Reconstructions(Hook):
    """Every `every` epochs, and after the first and the last, a picture of the same images' reconstructions."""

    def __init__(self, dataset, output_dir, every, count=8):
        self.dataset, self.output_dir, self.every, self.count = dataset, output_dir, every, count

    def on_epoch_end(self, state):
        done = state.epoch + 1
        if done % self.every and done not in (1, state.args.epochs):
            return
        count = min(self.count, len(self.dataset.images))
        numbers = [i * len(self.dataset.images) // count for i in range(count)]
        batch = Batch.collate([self.dataset[0, number] for number in numbers])
        device = state.args.device
        picture = reconstruct(state.model, batch.imgs.to(device), state.args.mask_ratio, batch.noise.to(device))
        picture.save(Path(self.output_dir) / f"reconstruction-{state.epoch:04}.png")
        add_picture(state, "reconstruction", picture, 1000 * done)


def add_picture(state, title, picture, at):
    """Show a Pillow RGB image in TensorBoard, if that is on."""
    if getattr(state, "writer", None):
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        state.writer.add_image(title, pixels.view(picture.height, picture.width, 3), at, dataformats="HWC")


@torch.no_grad()
def reconstruct(model, imgs, mask_ratio, noise=None):
    """A Pillow image with a row original | masked | reconstruction for each image of imgs (N, C, H, W) uint8."""
    was_training = model.training
    model.eval()
    normal = normalize(imgs)
    _, pred, mask = model(normal, mask_ratio=mask_ratio, noise=noise)
    model.train(was_training)
    reconstruction = denormalize(model.reconstruct(normal, pred.float(), mask))
    removed = model.unpatchify(
        mask[:, :, None].expand(-1, -1, model.patch_size**2 * model.in_chans),
        tuple(size // model.patch_size for size in imgs.shape[2:]),
    )
    masked = torch.where(removed.bool(), torch.full_like(imgs, 127), imgs)
    return draw_table(["original", "masked", "reconstruction"], [imgs, masked, reconstruction])


def draw_table(titles, columns, border=4, smallest=112, header=16):
    """A Pillow RGB image of images (N, C, H, W) uint8 in columns under their titles.

    The second half of N stands beside the first. Images less than `smallest` pixels wide are enlarged.
    """
    n, channels, height, width = columns[0].shape
    rows = -(-n // 2)
    enlarge = -(-smallest // width)
    width, height = width * enlarge, height * enlarge
    half = len(columns) * (width + border) + 2 * border
    table = Image.new("RGB", (half * (2 if n > 1 else 1), header + rows * (height + border)), "white")
    for j, (title, images) in enumerate(zip(titles, columns, strict=True)):
        images = images[:, :3] if channels >= 3 else images[:, :1].expand(-1, 3, -1, -1)
        for i, image in enumerate(images.permute(0, 2, 3, 1).contiguous().cpu().numpy()):
            left, top = i // rows * half + border + j * (width + border), header + i % rows * (height + border)
            if i % rows == 0:
                ImageDraw.Draw(table).text((left, 2), title, fill="black")
            table.paste(Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST), (left, top))
    return table


class ClassReport(Hook):
    """After the last evaluation: precision, recall and confusion of the classes, as CSV files and a picture."""

    LARGEST = 2000  # classes of a confusion matrix: it takes their square

    def __init__(self, output_dir):
        self.folder = Path(output_dir)

    def on_evaluate(self, state):
        if not state.evaluating and state.epoch + 1 < state.args.epochs:
            return
        names = state.class_names
        for what, evaluation in state.evaluations.items():
            rows = [(name, *values) for name, values in zip(names, evaluation.per_class(len(names)), strict=True)]
            self.write(f"per_class{what}.csv", ("class", "images", "precision", "recall"), rows)
            if len(names) > self.LARGEST:
                print(f"no confusion matrix: {len(names)} classes are more than {self.LARGEST}", flush=True)
                continue
            matrix = evaluation.confusion(len(names))
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


def draw_confusion(matrix, names, width=800):
    """A Pillow RGB image of a confusion matrix (K, K), a row a true class: the darker, the larger part of its images.

    With few classes each cell shows its count, and names stand beside rows and above columns.
    """
    count = len(matrix)
    cell = min(max(width // count, 1), 48)
    names = [name[:24] for name in names]
    margin = 40 + 6 * max(map(len, names)) if cell >= 12 else 40
    part = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    shade = 1 - part[:, :, None] * torch.tensor([0.88, 0.62, 0.35])  # white to blue
    heat = Image.fromarray((shade * 255).round().to(torch.uint8).numpy())
    picture = Image.new("RGB", (margin + cell * count + 8, margin + cell * count + 8), "white")
    picture.paste(heat.resize((cell * count,) * 2, Image.Resampling.NEAREST), (margin, margin))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((margin - 1, margin - 1, margin + cell * count, margin + cell * count), outline="lightgrey")
    draw.text((margin + 4, 4), "predicted", fill="grey")
    upright = Image.new("RGB", (margin - 20, cell * count), "white")  # the columns' names, before they are turned
    for i, name in enumerate(names if cell >= 12 else []):
        at = cell * i + cell // 2
        draw.text((margin - 6, margin + at), name, fill="black", anchor="rm")
        ImageDraw.Draw(upright).text((6, at), name, fill="black", anchor="lm")
        for j in range(count if cell >= 24 else 0):
            if matrix[i, j]:
                where, colour = (margin + cell * j + cell // 2, margin + at), "white" if part[i, j] > 0.5 else "black"
                draw.text(where, str(matrix[i, j].item()), fill=colour, anchor="mm")
    picture.paste(upright.rotate(90, expand=True), (margin, 20))
    draw.text((4, margin + 4 if cell < 12 else margin - 16), "true", fill="grey")
    return picture


class Checkpointer(Hook):
    """A checkpoint every save_ckpt_freq epochs, after the last one, and every save_ckpt_steps steps within an epoch.

    And one after each epoch that evaluated best: checkpoint-best.pth, or checkpoint-best-ema.pth by averaged weights.
    """

    everywhere = True  # reading the losses takes all processes

    written = None  # what was written last, by the main process

    def on_step(self, state):
        every = state.args.save_ckpt_steps
        if every and state.step % every == 0 and state.step != state.steps_per_epoch:
            self.save(state, step=state.step)

    def on_epoch_end(self, state):
        for what in state.evaluations:
            if state.best[what][1] == state.epoch:
                self.save(state, name="best" + what.replace("_", "-"))
        done = state.epoch + 1
        if done % state.args.save_ckpt_freq == 0 or done == state.args.epochs:
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
        if last or not which and state.epoch + 1 == state.args.epochs:
            return utils.on_main_process(lambda: self.write_last(state, which))
        try:
            self.write(state, which)
        except OSError as error:
            utils.log(
                f"checkpoint not saved: {error}. Those before it are kept; the next save tries again, training goes on."
            )

    def write(self, state, which):
        """On the main process. Raises OSError."""
        now = (state.epoch, which)
        if self.written != now:
            run = (state.args, state.epoch, None, state.model, state.optimizer, state.scaler, state.model_ema)
            utils.save_model(*run, **which, **state.progress())
            self.written = now

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
        """An evaluation that was given up leaves nothing: it is made anew after the end of the stop."""
        if not state.evaluations:
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
