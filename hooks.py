"""What happens around training: log lines, TensorBoard, pictures, checkpoints.

A hook reads the `RunState` and never changes the training. To add one, write a class and put it into the list in
`main_pretrain.py`:

    class GradientNorm(Hook):
        def on_step(self, state):
            print(state.epoch, state.step, ...)
"""

import json
import time
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw

import utils
from datasets import Batch, denormalize, normalize


class RunState:
    """Where a run stands: what hooks read and checkpoints keep. The same on every process but for its own images."""

    def __init__(self, args, model, optimizer, scaler, steps_per_epoch):
        self.args = args
        self.model = model  # without DDP and compilation
        self.optimizer = optimizer
        self.scaler = scaler
        self.steps_per_epoch = steps_per_epoch
        self.device_type = torch.device(args.device).type
        self.n_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.epoch = args.start_epoch
        self.step = 0  # optimizer steps done in this epoch
        self.lr = 0.0
        self.loss_sum, self.loss_count = 0.0, 0  # of this epoch's losses that were read
        self.recent_loss = float("nan")  # mean of those read last
        self.unread_losses = []  # tensors on the device
        self.unreadable_images = {}  # their names, in the order they were met
        self.start_clock()

    @property
    def epochs_done(self):
        """With a fraction."""
        return self.epoch + self.step / self.steps_per_epoch

    @property
    def train_loss(self):
        """Mean over this epoch, as far as it was read."""
        return self.loss_sum / max(self.loss_count, 1)

    def start_clock(self):
        self.clock = self.lap = time.perf_counter()
        self.data_time, self.lap_batches = 0.0, 0

    def observe_data(self, batch):
        """Note that the loader handed over a batch, and how long that took."""
        self.data_time += time.perf_counter() - self.clock
        self.lap_batches += 1
        self.unreadable_images |= dict.fromkeys(batch.unreadable)

    def observe_loss(self, loss):
        """Keep the loss of a batch, without waiting for the device."""
        self.unread_losses.append(loss.detach())
        self.clock = time.perf_counter()

    def read_losses(self):
        """Fetch the losses since the last time, averaged over processes: all must call it at the same step.

        Raises TrainingError, on all of them, at a loss that is not finite.
        """
        if not self.unread_losses:
            return
        losses = torch.stack(self.unread_losses).float()
        self.unread_losses = []
        if dist.is_initialized():
            dist.all_reduce(losses)
            losses /= dist.get_world_size()
        values = losses.tolist()
        for index, value in enumerate(values):
            if not -float("inf") < value < float("inf"):
                step = self.step - (len(values) - 1 - index) // self.args.update_freq
                raise utils.TrainingError(
                    f"loss is {value} in epoch {self.epoch}, step {step} of {self.steps_per_epoch}: stopped. "
                    "The last checkpoint is from before. A lower --blr or --amp_dtype bfloat16 may help"
                )
        self.recent_loss = sum(values) / len(values)
        self.loss_sum += sum(values)
        self.loss_count += len(values)

    def progress(self):
        """What a checkpoint keeps besides model, optimizer, scaler, epoch and step."""
        return {
            "loss_sum": self.loss_sum,
            "loss_count": self.loss_count,
            "unreadable_images": list(self.unreadable_images),
            "effective_batch_size": self.args.effective_batch_size,
        }

    def restore(self, checkpoint):
        """Stand where a checkpoint of this project was written."""
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scaler.load_state_dict(checkpoint["scaler"])
        self.epoch, self.step = checkpoint["epoch"], checkpoint["step"]
        if self.step:
            self.loss_sum, self.loss_count = checkpoint["loss_sum"], checkpoint["loss_count"]
        self.unreadable_images = dict.fromkeys(checkpoint["unreadable_images"])

    def end_epoch(self):
        self.epoch, self.step = self.epoch + 1, 0
        self.loss_sum, self.loss_count = 0.0, 0


class Hook:
    """Called at set points of a run with its `RunState`; by default on the main process only."""

    everywhere = False  # True: on every process. What a hook does there must be the same on each.

    def on_start(self, state):
        """Before the first epoch of this process."""

    def on_epoch_start(self, state): ...

    def on_step(self, state):
        """After an optimizer step; `state.step` counts it already."""

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


class LossReader(Hook):
    """Read the losses every print_freq steps and at the end of an epoch: before the hooks that report them."""

    everywhere = True

    def __init__(self, print_freq):
        self.print_freq = print_freq

    def on_step(self, state):
        if state.step % self.print_freq == 0 or state.step == state.steps_per_epoch:
            state.read_losses()


class UnreadableImages(Hook):
    """Name each image that could not be read, once, and stop the run when there are more than max_bad_images."""

    everywhere = True

    def __init__(self, max_bad_images):
        self.max_bad_images = max_bad_images
        self.told = 0

    def on_start(self, state):
        self.told = len(state.unreadable_images)

    def on_step(self, state):
        names = list(state.unreadable_images)
        for number, name in enumerate(names[self.told :], start=self.told + 1):
            print(
                f"unreadable image {number} (of --max_bad_images {self.max_bad_images}), left out: {name}", flush=True
            )
        self.told = len(names)
        if self.told > self.max_bad_images:
            raise utils.UserError(f"{self.told} images could not be read, --max_bad_images is {self.max_bad_images}")


class Console(Hook):
    """A line every print_freq steps and at the end of an epoch."""

    def __init__(self, print_freq):
        self.print_freq = print_freq

    def on_start(self, state):
        self.started, self.start = time.perf_counter(), state.epochs_done

    def on_step(self, state):
        if state.step % self.print_freq and state.step != state.steps_per_epoch:
            return
        now = time.perf_counter()
        args = state.args
        state.images_per_second = state.lap_batches * args.batch_size * utils.get_world_size() / (now - state.lap)
        left = (now - self.started) / (state.epochs_done - self.start) * (args.epochs - state.epochs_done)
        line = (
            f"epoch {state.epoch:>{len(str(args.epochs))}}/{args.epochs}"
            f"  step {state.step:>{len(str(state.steps_per_epoch))}}/{state.steps_per_epoch}"
            f"  loss {state.recent_loss:.4f} (epoch {state.train_loss:.4f})  lr {state.lr:.2e}"
            f"  {state.images_per_second:.0f} img/s  data {state.data_time / state.lap_batches:.3f} s/batch"
            f"  eta {hours(left)}"
        )
        if state.device_type == "cuda":
            line += f"  memory {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB"
        print(line, flush=True)
        state.start_clock()

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
    """log.txt in the output folder: one JSON object an epoch."""

    def __init__(self, output_dir):
        self.path = Path(output_dir) / "log.txt"

    def on_start(self, state):
        """Take back the lines of epochs that are trained again since no checkpoint of them was kept."""
        if self.path.exists():
            lines = self.path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if epoch_of(line) is not None and epoch_of(line) < state.epoch]
            if kept != lines:
                utils.write_whole(self.path, lambda file: file.write("".join(kept).encode()))

    def on_epoch_end(self, state):
        entry = {
            "train_loss": state.train_loss,
            "train_lr": state.lr,
            "epoch": state.epoch,
            "n_parameters": state.n_parameters,
        }
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def epoch_of(line):
    """The epoch of a line of log.txt, or None for a line cut short."""
    try:
        return json.loads(line)["epoch"]
    except ValueError:
        return None


class TensorBoard(Hook):
    """Scalars every print_freq steps; the step axis is 1000 x epochs done."""

    def __init__(self, log_dir, print_freq):
        self.log_dir, self.print_freq = log_dir, print_freq

    def on_start(self, state):
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        # What an earlier process of this run wrote beyond its last checkpoint is taken back.
        state.writer = self.writer = SummaryWriter(self.log_dir, purge_step=int(1000 * state.epochs_done))

    def on_step(self, state):
        if state.step % self.print_freq and state.step != state.steps_per_epoch:
            return
        at = int(1000 * state.epochs_done)
        self.writer.add_scalar("train/loss", state.recent_loss, at)
        self.writer.add_scalar("train/lr", state.lr, at)
        self.writer.add_scalar("train/images_per_second", state.images_per_second, at)

    def on_epoch_end(self, state):
        self.writer.add_scalar("epoch/train_loss", state.train_loss, 1000 * (state.epoch + 1))
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
    """A Pillow RGB image: one column of images (N, C, H, W) uint8 under each title; small images are enlarged."""
    n, channels, height, width = columns[0].shape
    enlarge = -(-smallest // width)
    width, height = width * enlarge, height * enlarge
    table = Image.new("RGB", (len(columns) * (width + border) + border, header + n * (height + border)), "white")
    for j, (title, images) in enumerate(zip(titles, columns, strict=True)):
        left = border + j * (width + border)
        ImageDraw.Draw(table).text((left, 2), title, fill="black")
        images = images[:, :3] if channels >= 3 else images[:, :1].expand(-1, 3, -1, -1)
        for i, image in enumerate(images.permute(0, 2, 3, 1).contiguous().cpu().numpy()):
            image = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
            table.paste(image, (left, header + i * (height + border)))
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
        """Write a checkpoint, unless the losses up to here tell that its weights are lost."""
        state.read_losses()
        try:
            utils.save_model(
                state.args, state.epoch, None, state.model, state.optimizer, state.scaler, step=step, **state.progress()
            )
        except OSError as error:
            utils.log(
                f"checkpoint not saved: {error}. Those before it are kept; the next save tries again, training goes on."
            )
