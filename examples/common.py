"""Shared by the examples: the encoder, its layer-decay optimizer, a loop over epochs that resumes."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

import flags
import utils
from checkpoints import load_checkpoint, save_together, training_flags
from images import find_statistics
from models import convnextv2
from models.utils import LayerNorm, names_without_decay
from optim_factory import LayerDecayValueAssigner, get_parameter_groups, half_cosine
from utils import UserError


def add_training_args(parser, epochs, lr):
    add = parser.add_argument
    add("--data_path", required=True, metavar="FOLDER", help="with train/ and val/, such as of examples.scenes")
    add("--encoder", default="", metavar="FILE", help="checkpoint in any form, or timm:NAME; empty: random weights")
    add("--freeze", default=False, action=flags.Switch, help="train the head alone")
    add("--model", default="convnextv2_atto", choices=list(convnextv2.SIZES), metavar="NAME", help="without --encoder")
    add("--epochs", default=epochs, type=flags.at_least(1), help="passes over the images")
    add("--batch_size", default=8, type=flags.at_least(1), help="images of a step")
    add("--lr", default=lr, type=flags.at_least(0.0), help="peak learning rate; a cosine after 10 % of warm-up")
    add("--layer_decay", default=0.9, type=flags.fraction_above_0, help="factor on the learning rate per block")
    add("--weight_decay", default=0.05, type=flags.at_least(0.0), help="none on norms, biases and GRN")
    add("--drop_path", default=0.0, type=flags.fraction_below_1, help="drop path rate of the last block")
    add("--seed", default=0, type=flags.at_least(0), help="seed of the weights and the order")
    add("--output_dir", metavar="FOLDER", help="for checkpoint.pth, from which the same command resumes; None: none")
    flags.add_device_arg(add)


def build_encoder(args):
    """The dense network, without its classifier; its `statistics` are for `images.normalize`. Raises UserError."""
    checkpoint = load_checkpoint(args.encoder) if args.encoder else {}
    torch.manual_seed(args.seed)
    with utils.name_in_errors(f"--encoder {args.encoder}"):
        if args.encoder:
            checkpoint["config"] = (checkpoint.get("config") or {}) | {"drop_path_rate": args.drop_path}
            model, _ = convnextv2.from_checkpoint(checkpoint)
        else:
            model = convnextv2.__dict__[args.model](num_classes=1, drop_path_rate=args.drop_path)
        model.statistics = find_statistics(training_flags(checkpoint), 3)
    del model.norm, model.head
    torch.manual_seed(args.seed)  # the same head whatever the encoder
    return model.requires_grad_(not args.freeze)


class Scales(nn.Module):
    """Images (N, 3, H, W) -> {"0": (N, C, h, w), ..., "3": ...}, the encoder's four scales, as torchvision names them.

    Each has a norm of its own, as ConvNeXt's detectors have.
    """

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.norms = nn.ModuleList(LayerNorm(dim, data_format="channels_first") for dim in encoder.dims)

    def forward(self, imgs):
        maps = zip("0123", self.norms, self.encoder.feature_maps(imgs), strict=True)
        return {scale: norm(x) for scale, norm, x in maps}


def build_optimizer(args, model):
    """AdamW with layer decay over the blocks of the encoder in a model; all else has the full learning rate."""
    depths = next(module.depths for module in model.modules() if isinstance(module, convnextv2.ConvNeXtV2))
    assigner = LayerDecayValueAssigner.of_decay(args.layer_decay, depths, "single")

    def get_num_layer(name):
        _, within, layer = name.rpartition("encoder.")
        return assigner.get_layer_id(layer if within else "head")

    model.no_weight_decay = lambda: names_without_decay(model)
    groups = get_parameter_groups(model, args.weight_decay, (), get_num_layer, assigner.get_scale)
    return torch.optim.AdamW(groups, lr=args.lr)


def read_image(path, mode=None):
    """Pixels (H, W) or (H, W, C) of a file, in a mode of Pillow. Raises UserError if it cannot be read."""
    try:
        image = Image.open(path)
        return np.array(image.convert(mode) if mode else image)
    except OSError as error:
        raise UserError(f"--data_path: {path}: {error}") from None


def train(args, model, count, compute_loss, evaluate):
    """Train for --epochs over `count` images, resuming from checkpoint.pth; print and return evaluate().

    compute_loss(indices): the loss of the images of these numbers. The order is a function of (seed, epoch).
    """
    optimizer, first = build_optimizer(args, model), 0
    path = Path(args.output_dir) / "checkpoint.pth" if args.output_dir else None
    if path and path.exists():
        checkpoint = load_checkpoint(path)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        first = checkpoint["epoch"]
        print(f"resuming from {path}: {first} epochs are done")
    elif path:
        path.parent.mkdir(parents=True, exist_ok=True)
    steps = max(count // args.batch_size, 1)
    for epoch in range(first, args.epochs):
        utils.set_seed(args.seed, epoch)
        order, losses = np.random.default_rng((args.seed, epoch)).permutation(count), []
        model.train()
        for step in range(steps):
            progress = (epoch + step / steps) / args.epochs
            lr = args.lr * progress / 0.1 if progress < 0.1 else half_cosine(args.lr, 0, (progress - 0.1) / 0.9)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            loss = compute_loss(order[step * args.batch_size :][: args.batch_size].tolist())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}/{args.epochs}  loss {np.mean(losses):.4f}", flush=True)
        if path:
            content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}
            save_together({path: content | {"args": dict(vars(args))}})
    model.eval()
    with torch.inference_mode():
        return evaluate()
