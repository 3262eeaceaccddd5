"""What happens around training: log lines, TensorBoard, pictures, checkpoints.

A hook reads the `RunState` and never changes the training. To add one, write a class and put it into the list in
`main_pretrain.py`:

    class GradientNorm(Hook):
        def on_step(self, state):
            print(state.epoch, state.step, ...)
"""

import json
import math
import time
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw

import utils
from datasets import Batch, denormalize, normalize


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

    def __init__(self, args, model, optimizer, scaler, steps_per_epoch, num_images):
        self.args = args
        self.model = model  # without DDP and compilation
        self.optimizer = optimizer
        self.scaler = scaler
        self.steps_per_epoch = steps_per_epoch
        self.num_images = num_images
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
        self.start_lap()

    @property
    def epochs_done(self):
        """With a fraction."""
        return self.epoch + self.step / self.steps_per_epoch

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
        if dist.is_initialized():
            dist.all_reduce(losses)
            losses /= dist.get_world_size()
            names = [None] * dist.get_world_size()
            dist.all_gather_object(names, self.unread_names)
        self.unread_losses, self.unread_names = [], []
        self.unreadable_images |= dict.fromkeys(name for some in names for name in some)
        values = losses.tolist()
        bad = [index for index, value in enumerate(values) if not math.isfinite(value)]
        if bad:
            step = self.step - (len(values) - 1 - bad[0]) // self.args.update_freq
            raise utils.TrainingError(
                f"loss is {values[bad[0]]} in epoch {self.epoch}, step {step} of {self.steps_per_epoch}: stopped. "
                "The last checkpoint is from before. A lower --blr or --amp_dtype bfloat16 may help"
            )
        self.epoch_loss.add(values)
        self.lap_loss.add(values)

    def progress(self):
        """What a checkpoint keeps besides model, optimizer, scaler, epoch and step."""
        return {
            "epoch_loss": [self.epoch_loss.sum, self.epoch_loss.count],
            "unreadable_images": list(self.unreadable_images),
            "effective_batch_size": self.args.effective_batch_size,
            "num_images": self.num_images,
        }

    def restore(self, checkpoint):
        """Stand where a checkpoint of this project was written."""
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scaler.load_state_dict(checkpoint["scaler"])
        self.epoch, self.step = checkpoint["epoch"], checkpoint["step"]
        if self.step:
            self.epoch_loss = Mean(*checkpoint["epoch_loss"])
        self.unreadable_images = dict.fromkeys(checkpoint["unreadable_images"])

    def end_epoch(self):
        self.epoch, self.step = self.epoch + 1, 0
        self.epoch_loss = Mean()


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

    def on_epoch_end(self, state):
        """After the last step of an epoch; `state.epoch` is that epoch."""

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


class UnreadableImages(Hook):
    """Name each image that could not be read, once, and stop the run when there are more than max_bad_images."""

    everywhere = True  # all know the same names, so all stop together

    def __init__(self, max_bad_images):
        self.max_bad_images = max_bad_images

    def on_start(self, state):
        self.told = len(state.unreadable_images)

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

    def on_end(self, state):
        print(
            f"trained {state.epochs_done - self.start:g} epochs in {hours(time.perf_counter() - self.started)}",
            flush=True,
        )


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
        entry = {
            "train_loss": state.epoch_loss.value,
            "train_lr": state.lr,
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
        state.writer = self.writer = SummaryWriter(self.log_dir, purge_step=int(1000 * state.epochs_done) + 1)

    def on_log(self, state):
        at = int(1000 * state.epochs_done)
        self.writer.add_scalar("train/loss", state.loss, at)
        self.writer.add_scalar("train/lr", state.lr, at)
        self.writer.add_scalar("train/images_per_second", state.images_per_second, at)

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
        if getattr(state, "writer", None):
            pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
            pixels = pixels.view(picture.height, picture.width, 3)
            state.writer.add_image("reconstruction", pixels, 1000 * done, dataformats="HWC")


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


class Checkpointer(Hook):
    """A checkpoint every save_ckpt_freq epochs, after the last one, and every save_ckpt_steps steps within an epoch."""

    everywhere = True  # reading the losses takes all processes

    def on_step(self, state):
        every = state.args.save_ckpt_steps
        if every and state.step % every == 0 and state.step != state.steps_per_epoch:
            self.save(state, step=state.step)

    def on_epoch_end(self, state):
        done = state.epoch + 1
        if done % state.args.save_ckpt_freq == 0 or done == state.args.epochs:
            self.save(state)

    @staticmethod
    def save(state, step=None):
        """Write a checkpoint. Raises TrainingError if the weights are lost, or if the last one cannot be written."""
        state.read_losses()
        if not torch.nn.utils.get_total_norm(state.model.parameters()).isfinite():
            raise utils.TrainingError(
                f"weights are not finite after step {state.step} of epoch {state.epoch}: stopped. "
                "The last checkpoint is from before. A lower --blr or --amp_dtype bfloat16 may help"
            )
        try:
            utils.save_model(
                state.args, state.epoch, None, state.model, state.optimizer, state.scaler, step=step, **state.progress()
            )
        except OSError as error:
            if step is None and state.epoch + 1 == state.args.epochs:
                raise utils.TrainingError(f"the last checkpoint could not be saved: {error}") from None
            utils.log(
                f"checkpoint not saved: {error}. Those before it are kept; the next save tries again, training goes on."
            )
