"""How good are frozen features? A k-nearest-neighbour and a linear classifier on them, without augmentation.

    python -m tools.probe --checkpoint OUTPUT/checkpoint-799.pth --data_path LABELLED
    torchrun --nproc_per_node=8 -m tools.probe --checkpoint OUTPUT/checkpoint-799.pth --data_path IMAGENET
    python -m tools.probe --checkpoint OUTPUT/checkpoint-19.pth --data_path DIGITS

A feature is the mean over all sites of the encoder's last stage, of the whole image. The classifiers are fitted on the
training images and judged on the others; both are deterministic.
"""

from argparse import Namespace

import torch
import torch.nn.functional as F

import datasets
import utils
from engine_finetune import collect
from hooks import Hook
from models.convnextv2 import from_checkpoint

METRICS = ("probe_knn", "probe_linear")


class GivenUp(Exception):
    """A signal came within a fit."""


def knn_accuracy(train, train_targets, test, test_targets, k=20, temperature=0.07):
    """Top-1 per cent of the k nearest neighbours by cosine, weighted by exp(cosine / temperature) (Wu et al., 2018).

    train (n, C), test (m, C): features; targets (n,), (m,): classes.
    """
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    right = 0
    for some, targets in zip(test.split(1024), test_targets.split(1024), strict=True):
        nearest = (some @ train.T).topk(min(k, len(train)))
        weights = ((nearest.values - 1) / temperature).exp()
        votes = weights.new_zeros(len(some), train_targets.max() + 1)
        votes.scatter_add_(1, train_targets[nearest.indices], weights)
        right += (votes.argmax(1) == targets).sum().item()
    return 100 * right / len(test)


def linear_accuracy(train, train_targets, test, test_targets, strength=1.0, give_up=lambda: False):
    """Top-1 per cent of a logistic regression on standardised features, shapes as in `knn_accuracy`; None if given up.

    It minimises the sum of cross-entropies + |weights|^2 / (2 strength) by L-BFGS, to the end: there is one minimum,
    and no learning rate or number of epochs to choose.
    """
    mean, std = train.mean(0), train.std(0, correction=0).clamp(min=1e-12)
    train, test = (train - mean) / std, (test - mean) / std
    weight = train.new_zeros(train_targets.max() + 1, train.shape[1], requires_grad=True)
    bias = train.new_zeros(len(weight), requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=1000, tolerance_grad=1e-7, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure():
        if give_up():
            raise GivenUp
        optimizer.zero_grad()
        loss = F.cross_entropy(train @ weight.T + bias, train_targets)
        loss = loss + weight.square().sum() / (2 * strength * len(train))
        loss.backward()
        return loss

    try:
        optimizer.step(closure)
    except GivenUp:
        return None
    with torch.no_grad():
        return 100 * ((test @ weight.T + bias).argmax(1) == test_targets).double().mean().item()


def build_loaders(args, data_path, images_per_class=0):
    """Loaders of this process's part of the labelled images, for fitting and for judging. Raises UserError."""
    data_set = "DIGITS" if data_path == "DIGITS" else "IMNET"
    where = dict(data_set=data_set, data_path=data_path, eval_data_path=None, images_per_class=images_per_class)
    how = dict(imagenet_default_mean_and_std=True, crop_pct=None, eval_size=None, dist_eval=True)
    args = Namespace(**vars(args) | where | how)
    transform = datasets.build_transform(False, args)
    train = datasets.build_images(True, args)
    test = datasets.build_images(False, args, train.class_names)
    return [datasets.build_eval_loader(datasets.EvalDataset(images, transform), args) for images in (train, test)]


def probe(trunk, loaders, args, give_up=lambda: False):
    """Accuracies of the features of trunk(imgs) -> (N, C, h, w), classes (n,) by loader, names of unreadable images.

    Accuracies: {"probe_knn": per cent, "probe_linear": per cent}. By all processes together, each of which passes its
    part of the images through the network; the same on all and on any number of them. None if given up on any process.
    """

    def mean_features(imgs, _):
        return trunk(datasets.normalize(imgs)).float().mean((2, 3))

    device, parts, unreadable = torch.device(args.device), [], []
    for loader in loaders:
        collected = collect(mean_features, loader, device, args, give_up=give_up)
        if collected is None:
            return None
        *features_and_targets, names = collected
        parts += features_and_targets
        unreadable += names

    def classify():
        features, targets, test, test_targets = (part.to(device) for part in parts)
        linear = linear_accuracy(features.double(), targets, test.double(), test_targets, give_up=give_up)
        return None if linear is None else (knn_accuracy(features, targets, test, test_targets), linear)

    accuracies = utils.on_main_process(classify)
    return None if accuracies is None else (dict(zip(METRICS, accuracies, strict=True)), parts[1::2], unreadable)


class Probe(Hook):
    """Every args.probe_freq epochs of pre-training, and after the first and the last, `probe` the encoder."""

    everywhere = True

    def __init__(self, args):
        where = args.probe_data_path, args.probe_images_per_class
        self.loaders = utils.on_all_processes(lambda: build_loaders(args, *where))

    def on_evaluate(self, state):
        if not state.due(state.args.probe_freq):
            return
        model, num_patches = state.model, state.args.num_patches

        def trunk(imgs):
            nothing_removed = torch.zeros(len(imgs), num_patches, device=imgs.device)
            return model.encoder(imgs, nothing_removed, num_visible=num_patches)

        model.eval()
        result = probe(trunk, self.loaders, state.args, state.stop_requested)
        model.train()
        state.given_up = result is None
        if result is not None:
            accuracies, _, unreadable = result
            state.metrics |= accuracies
            state.observe_unreadable(unreadable)


def get_args_parser():
    parser = utils.FlagParser(add_help=False)
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="of any known form")
    parser.add_argument(
        "--data_path", required=True, metavar="FOLDER", help="train/ and val/ of class folders, or DIGITS"
    )
    parser.add_argument("--images_per_class", default=0, type=int, help="fit on the first of each class only; 0: all")
    parser.add_argument(
        "--input_size", default=None, type=int, nargs="+", metavar="PIXELS", help="None: that of the training, else 224"
    )
    parser.add_argument("--model_key", default="model|module", help="where the weights are; model_ema: averaged ones")
    parser.add_argument("--batch_size", default=64, type=int, help="images of a forward pass")
    datasets.add_loader_args(parser)
    utils.add_machine_args(parser, training=False)
    return parser


def main(args):
    utils.check_machine_args(args)
    datasets.check_loader_args(args)
    utils.check_least(args, 1, "batch_size")
    utils.check_least(args, 0, "images_per_class")
    checkpoint = utils.load_checkpoint(args.checkpoint)
    model, _ = from_checkpoint(checkpoint, args.checkpoint, args.model_key)
    stem = model.downsample_layers[0][0]
    args.in_chans = stem.in_channels
    args.input_size = args.input_size or utils.training_flags(checkpoint).get("input_size", 224)
    args.input_size = utils.image_size(args, least=8 * stem.stride[0])
    utils.init_distributed_mode(args)
    loaders = utils.on_all_processes(lambda: build_loaders(args, args.data_path, args.images_per_class))
    accuracies, targets, unreadable = probe(utils.to_device(model, args).eval().forward_trunk, loaders, args)
    for name in unreadable:
        utils.log(f"unreadable image, left out: {name}")
    counts = " and ".join(str(len(classes)) for classes in targets)
    results = f"k-nearest-neighbour {accuracies['probe_knn']:.2f} %  linear {accuracies['probe_linear']:.2f} %"
    utils.log(f"{args.checkpoint}: {results}  ({counts} images)")


if __name__ == "__main__":
    utils.run_script(main, utils.FlagParser(description=__doc__.splitlines()[0], parents=[get_args_parser()]))
