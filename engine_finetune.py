"""The fine-tuning step, with augmentation, random erasing and mixup on the device, and the evaluation."""

import torch
import torch.nn.functional as F

import utils
from augmentations import augment
from engine_pretrain import optimize
from evaluation import collect
from flags import at_least, fraction
from images import normalize, statistics_of
from utils import UserError


def add_batch_args(parser):
    """The flags of what is done to a batch on the device."""
    add = parser.add_argument_group("random erasing and mixup").add_argument
    add("--reprob", default=0.25, type=fraction, help="probability of random erasing, per image")
    fills = ("pixel", "rand", "const")
    add("--remode", default="pixel", choices=fills, help="erase by noise per pixel, one random color, or 0")
    add("--recount", default=1, type=at_least(1, 100), help="largest number of erased rectangles per image")
    add("--mixup", default=0.0, type=at_least(0.0), help="alpha of mixup; 0: none")
    add("--cutmix", default=0.0, type=at_least(0.0), help="alpha of cutmix; 0: none")
    sides = "range of the cut's sides, as a fraction of the image's; None: drawn by --cutmix"
    add("--cutmix_minmax", type=fraction, nargs=2, help=sides)
    add("--mixup_prob", default=1.0, type=fraction, help="probability of mixing, per draw of --mixup_mode")
    add("--mixup_switch_prob", default=0.5, type=fraction, help="probability of cutmix where both are on")
    modes = ("batch", "pair", "elem")
    add("--mixup_mode", default="batch", choices=modes, help="draw once per batch, pair of images or image")


def check_batch_args(args):
    """Raise UserError for flags of `add_batch_args` that do not fit each other or the batch size."""
    if mixes(args) and args.batch_size % 2:
        raise UserError(f"--batch_size {args.batch_size}: must be even for mixup and cutmix")
    low, high = args.cutmix_minmax or (0, 1)
    if low > high or high == 0:
        raise UserError(f"--cutmix_minmax {low} {high}: give the smaller first, and the larger above 0")


def build_erasing(args, device):
    """timm's random erasing of a normalized batch (N, C, H, W) on the device, in place; None with --reprob 0."""
    from timm.data.random_erasing import RandomErasing

    return RandomErasing(args.reprob, mode=args.remode, max_count=args.recount, device=device) if args.reprob else None


def mixes(args):
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def build_mixup(args, num_classes):
    """mixup(images, targets (N,) or (N, K)) -> mixed images, targets (N, K) mixed alike; None if nothing mixes."""
    from timm.data import Mixup

    if not mixes(args):
        return None
    mix = Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=0.0,  # the loss smooths
        num_classes=args.batch_size,
    )

    def mixup(imgs, targets):
        targets = F.one_hot(targets, num_classes).float() if targets.ndim == 1 else targets
        imgs, shares = mix(imgs, torch.arange(len(imgs), device=imgs.device))  # (N, batch size): of each image
        with torch.autocast(imgs.device.type, enabled=False):
            return imgs, shares[:, : len(imgs)] @ targets

    return mixup


def train_one_epoch(model, criterion, loader, run, erasing_fn=None, mixup_fn=None):
    """Train from step `run.step` to the end of epoch `run.epoch`; `loader` yields the rest of that epoch.

    criterion(outputs (N, K), targets): see `tasks.Task.build_loss`.
    erasing_fn: normalized images -> the same with rectangles erased. mixup_fn: (images, targets) -> both mixed.
    """
    statistics = statistics_of(run.args)

    def compute_loss(batch):
        imgs, targets = augment(batch.imgs, batch.rounds, batch.numbers), batch.targets
        imgs = normalize(imgs, statistics)
        if erasing_fn is not None:
            imgs = erasing_fn(imgs)
        if mixup_fn is not None:
            imgs, targets = mixup_fn(imgs, targets)
        return criterion(model(imgs).float(), targets)  # autocast on the CPU leaves a loss in low precision

    optimize(compute_loss, model, loader, run)


def evaluate(model, loader, task, args, give_up=lambda: False):
    """The `Evaluation` of a model by all ranks together, exact: no image counts twice. All ranks get the same.

    With --eval_size the head is applied to every window as large as a training image, and its logits are averaged.
    give_up: asked at every batch; once it is true on any rank, the result is None on all (with --dist_eval).
    Raises UserError if no image could be read.
    """
    device = next(model.parameters()).device  # EMA weights may be on the CPU
    window = [side // (8 * args.stem_stride) for side in args.input_size] if args.eval_size else None
    statistics = statistics_of(args)

    def measure(imgs, targets):
        return task.measure(model(normalize(imgs, statistics), window=window).float(), targets, args.topk)

    model.eval()
    collected = collect(measure, loader, device, lambda: utils.autocast(args, device), args.dist_eval, give_up)
    if collected is None:
        return None
    rows, targets, unreadable = collected
    return task.evaluate(rows, targets, args.topk, unreadable)
