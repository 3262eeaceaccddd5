"""The fine-tuning step and the evaluation, and nothing about files: those are in hooks.py."""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from engine_pretrain import autocast, optimize
from utils import UserError


def train_one_epoch(model, criterion, loader, optimizer, scaler, state, hooks, args, mixup_fn=None):
    """Train from step `state.step` to the end of epoch `state.epoch`; `loader` yields the rest of that epoch.

    mixup_fn: (images, classes (N,)) -> mixed images, class probabilities (N, K), for criterion(logits, these).
    """

    def forward(batch):
        imgs = batch.imgs.to(args.device, non_blocking=True)
        targets = batch.targets.to(args.device, non_blocking=True)
        if mixup_fn is not None:
            imgs, targets = mixup_fn(imgs, targets)
        return criterion(model(imgs).float(), targets)  # autocast on the CPU leaves a loss in low precision

    optimize(forward, model, loader, optimizer, scaler, state, hooks, args)


class Evaluation(NamedTuple):
    """What a model made of every image of a data set that could be read, in the order of the set."""

    loss: float  # mean cross-entropy
    acc1: float  # top-1 accuracy in per cent
    acc5: float  # top-5; of fewer classes all
    targets: torch.Tensor  # (n,) classes
    predictions: torch.Tensor  # (n,) likeliest classes
    unreadable: list  # names of the images left out

    def __str__(self):
        top = f"top-1 {self.acc1:.2f} %  top-5 {self.acc5:.2f} %  loss {self.loss:.4f}"
        left_out = f", {len(self.unreadable)} unreadable left out" if self.unreadable else ""
        return f"{top}  ({len(self.targets)} images{left_out})"

    def confusion(self, num_classes):
        """(K, K) counts: row the true class, column the predicted one."""
        pairs = self.targets * num_classes + self.predictions
        return pairs.bincount(minlength=num_classes**2).view(num_classes, num_classes)

    def per_class(self, num_classes):
        """A row for each class: images, precision and recall; nan where there is none to divide by."""
        images = self.targets.bincount(minlength=num_classes)
        predicted = self.predictions.bincount(minlength=num_classes)
        right = self.targets[self.targets == self.predictions].bincount(minlength=num_classes)
        precision, recall = (right / predicted).tolist(), (right / images).tolist()
        return [(n, round(p, 4), round(r, 4)) for n, p, r in zip(images.tolist(), precision, recall, strict=True)]


@torch.inference_mode()
def evaluate(model, loader, args, give_up=lambda: False):
    """The `Evaluation` of a model by all processes together, exact: no image counts twice. All get the same.

    give_up: asked at every batch; once it is true on any process, the result is None on all (with args.dist_eval).
    Raises UserError if no image could be read.
    """
    model.eval()
    device = next(model.parameters()).device  # averaged weights may be elsewhere
    given_up = False
    rows, unreadable = [torch.empty(0, 5, dtype=torch.float64, device=device)], []
    for batch in loader:
        given_up = give_up()
        if given_up:
            break
        unreadable += batch.unreadable
        if not len(batch.imgs):
            continue
        imgs = batch.imgs.to(device, non_blocking=True)
        targets = batch.targets.to(device, non_blocking=True)
        with autocast(args):
            logits = model(imgs)
        logits = logits.float()
        top = logits.topk(min(5, logits.shape[1])).indices
        in_top = (top == targets[:, None]).any(1)
        loss = F.cross_entropy(logits, targets, reduction="none")
        columns = (batch.indices.to(device), targets, top[:, 0], in_top, loss)
        rows.append(torch.stack([column.double() for column in columns], dim=1))
    rows = torch.cat(rows).cpu()
    if dist.is_initialized() and args.dist_eval:
        rows, unreadable, given_up = gather(rows, unreadable, given_up)
    if given_up:
        return None
    if not len(rows):
        raise UserError(f"none of the images could be read: {unreadable[0]}")
    # In the order of the set, so that the sums do not depend on how it was divided
    _, targets, predictions, in_top, loss = rows[rows[:, 0].argsort()].unbind(1)
    return Evaluation(
        loss=loss.mean().item(),
        acc1=100 * (targets == predictions).double().mean().item(),
        acc5=100 * in_top.mean().item(),
        targets=targets.long(),
        predictions=predictions.long(),
        unreadable=unreadable,
    )


def gather(rows, unreadable, given_up):
    """The rows and names of all processes, on each, and whether any has given up."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (rows, unreadable, given_up))
    rows, names, flags = zip(*parts, strict=True)
    return torch.cat(rows), [name for some in names for name in some], any(flags)
