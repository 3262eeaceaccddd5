"""The fine-tuning step and the evaluation, and nothing about files: those are in hooks.py."""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from datasets import normalize
from engine_pretrain import autocast, optimize
from utils import Evaluation, UserError


def train_one_epoch(model, criterion, loader, optimizer, scaler, state, hooks, args, mixup_fn=None):
    """Train from step `state.step` to the end of epoch `state.epoch`; `loader` yields the rest of that epoch.

    mixup_fn: (images, classes (N,)) -> mixed images, class probabilities (N, K), for criterion(logits, these).
    """

    def forward(batch):
        imgs, targets = batch.augmented(args.imagenet_default_mean_and_std), batch.targets
        if mixup_fn is not None:
            imgs, targets = mixup_fn(imgs, targets)
        return criterion(model(imgs).float(), targets)  # autocast on the CPU leaves a loss in low precision

    optimize(forward, model, loader, optimizer, scaler, state, hooks, args)


def evaluate(model, loader, args, give_up=lambda: False):
    """The `Evaluation` of a model by all processes together, exact: no image counts twice. All get the same.

    With args.pool_window the head is applied to each such window of sites, and the logits are averaged.
    give_up: asked at every batch; once it is true on any process, the result is None on all (with args.dist_eval).
    Raises UserError if no image could be read.
    """
    most = max(args.topk)

    def losses_and_classes(imgs, targets):
        imgs = normalize(imgs, args.imagenet_default_mean_and_std)
        logits = model(imgs, window=args.pool_window).float()
        top = logits.topk(min(most, logits.shape[1])).indices
        return torch.cat([F.cross_entropy(logits, targets, reduction="none")[:, None].double(), top.double()], dim=1)

    device = next(model.parameters()).device  # averaged weights may be elsewhere
    model.eval()
    collected = collect(losses_and_classes, loader, device, args, args.dist_eval, give_up)
    if collected is None:
        return None
    rows, targets, unreadable = collected
    num_classes = model.head.out_features
    return Evaluation(rows[:, 0].mean().item(), targets, rows[:, 1:].long(), num_classes, args.topk, unreadable)


@torch.no_grad()
def collect(function, loader, device, args, divided=True, give_up=lambda: False):
    """function(uint8 imgs, targets) -> a row (n, D) each, of every image of a set, on the CPU in the order of the set.

    divided: each process's loader yields a part; all get the whole. give_up: as in `evaluate`.
    Returns rows (n, D), targets (n,) and names of unreadable images, or None. Raises UserError if all are unreadable.
    """
    rows, order, targets, unreadable, given_up = [], [], [], [], False
    for batch in loader:
        given_up = give_up()
        if given_up:
            break
        unreadable += batch.unreadable
        if len(batch.imgs):
            with autocast(args):
                row = function(batch.imgs.to(device, non_blocking=True), batch.targets.to(device, non_blocking=True))
            rows.append(row.cpu())
            order.append(batch.indices)
            targets.append(batch.targets)
    if dist.is_initialized() and divided:
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, (rows, order, targets, unreadable, given_up))
        *lists, flags = zip(*parts, strict=True)
        rows, order, targets, unreadable = (sum(some, []) for some in lists)
        given_up = any(flags)
    if given_up:
        return None
    if not rows:
        raise UserError(f"none of the images could be read: {unreadable[0]}")
    in_order = torch.cat(order).argsort()  # so that sums do not depend on how the set was divided
    return torch.cat(rows)[in_order], torch.cat(targets)[in_order], unreadable
