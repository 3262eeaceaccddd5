"""FCMAE pre-training of ConvNeXt V2 on a folder of images.

    python main_pretrain.py @recipes/demo_digits.args --output_dir output/digits      # a demo, on any machine
    python main_pretrain.py --data_path IMAGES --output_dir OUTPUT                    # one GPU, or the CPU
    torchrun --nproc_per_node=8 main_pretrain.py @recipes/pretrain_imagenet.args --data_path IMAGES --output_dir OUTPUT

Run the same command again to go on after a stop of any kind.
"""

import argparse

import utils  # isort: skip  (before torch)
import torch

import datasets
import hooks
import optim_factory
from engine_pretrain import train_one_epoch
from models import fcmae
from models.checkpoints import resume
from models.convnextv2 import SIZES
from models.utils import describe
from tools import probe
from utils import UserError, log


def get_args_parser():
    parser = utils.FlagParser(add_help=False)
    optim_factory.add_schedule_args(parser, epochs=800, warmup_epochs=40, blr=1.5e-4, min_lr=0.0)
    utils.add_model_args(parser, SIZES)

    group = parser.add_argument_group("masked autoencoder")
    group.add_argument("--mask_ratio", default=0.6, type=float, help="part of the patches that is removed")
    group.add_argument(
        "--norm_pix_loss",
        default=True,
        action=argparse.BooleanOptionalAction,
        help="predict pixels normalised per patch",
    )
    group.add_argument("--decoder_depth", default=1, type=int, help="blocks of the decoder")
    group.add_argument("--decoder_embed_dim", default=512, type=int, help="channels of the decoder")
    group.add_argument(
        "--sparse_backend",
        default="packed",
        choices=("packed", "minkowski"),
        help="sparse convolutions in plain PyTorch, or by MinkowskiEngine",
    )

    group = parser.add_argument_group("data")
    group.add_argument(
        "--data_set", default="image_folder", choices=("image_folder", "DIGITS"), help="DIGITS comes with scikit-learn"
    )
    group.add_argument(
        "--data_path", default=None, metavar="FOLDER", help="folder of images, nested or flat; its train/ if it has one"
    )
    group.add_argument(
        "--scale", default=(0.2, 1.0), type=float, nargs=2, help="least and largest part of an image that a crop shows"
    )
    group.add_argument("--hflip", default=0.5, type=float, help="part of the images that is mirrored")
    group.add_argument(
        "--repeated_sampling",
        default=1,
        type=int,
        help="samples from an image that is read, each with its crop and mask",
    )

    group = parser.add_argument_group("pictures and probes")
    group.add_argument(
        "--picture_freq", default=10, type=int, help="epochs between pictures of reconstructions; 0: none"
    )
    group.add_argument(
        "--probe_freq", default=0, type=int, help="epochs between probes of the frozen features by labels; 0: none"
    )
    group.add_argument(
        "--probe_images_per_class",
        default=0,
        type=int,
        help="the probe is fitted on the first of each class only; 0: all",
    )
    group.add_argument(
        "--probe_data_path",
        default="DIGITS",
        metavar="FOLDER",
        help="the labelled images for it: train/ and val/ of class folders; DIGITS: scikit-learn's",
    )

    datasets.add_loader_args(parser)
    utils.add_machine_args(parser)
    hooks.add_output_args(parser, watched="no best one")
    return parser


def check_args(args):
    """Complete the flags, or raise UserError for those that cannot work, before anything is loaded."""
    unit = 8 * args.stem_stride
    args.input_size = utils.image_size(args, least=unit, multiple_of=unit)
    args.num_patches = (args.input_size[0] // unit) * (args.input_size[1] // unit)
    if not 0 < args.mask_ratio < 1 or not 0 < int(args.num_patches * (1 - args.mask_ratio)) < args.num_patches:
        raise UserError(
            f"--mask_ratio {args.mask_ratio}: must be between 0 and 1, and leave and remove at least one "
            f"of the {args.num_patches} patches"
        )
    utils.check_least(args, 1, "in_chans")
    utils.check_machine_args(args)
    optim_factory.check_schedule_args(args)
    datasets.check_loader_args(args)
    hooks.check_output_args(args, metrics=["train_loss", *(probe.METRICS if args.probe_freq else [])])
    utils.check_least(args, 1, "decoder_embed_dim repeated_sampling")
    utils.check_least(args, 0, "decoder_depth picture_freq probe_freq probe_images_per_class")
    utils.check_part(args, "hflip")
    if not 0 < args.scale[0] <= args.scale[1] <= 1:
        raise UserError(f"--scale {args.scale[0]} {args.scale[1]}: must be above 0, at most 1, the smaller first")
    if args.data_set == "image_folder" and not args.data_path:
        raise UserError("--data_path: give a folder of images, or --data_set DIGITS")
    if args.data_set == "DIGITS" or args.probe_freq and args.probe_data_path == "DIGITS":
        datasets.check_colour_mode(args, "DIGITS")


def build_model(args):
    try:
        return fcmae.__dict__[args.model](
            img_size=args.input_size,
            in_chans=args.in_chans,
            decoder_depth=args.decoder_depth,
            decoder_embed_dim=args.decoder_embed_dim,
            patch_size=8 * args.stem_stride,
            mask_ratio=args.mask_ratio,
            norm_pix_loss=args.norm_pix_loss,
            sparse_backend=args.sparse_backend,
        )
    except ImportError as error:
        raise UserError(str(error)) from None


# What decides a run's numbers: a resumed run says if it changed.
RUN_FLAGS = (
    "mask_ratio norm_pix_loss data_set data_path scale hflip repeated_sampling input_size use_amp amp_dtype num_images"
).split() + optim_factory.SCHEDULE_FLAGS


def build_hooks(args, dataset):
    observers = [hooks.UnreadableImages(args.max_bad_images), hooks.Console()]
    if args.output_dir:
        observers.append(hooks.LogFile(args.output_dir))
    if args.log_dir or args.output_dir:
        observers.append(hooks.TensorBoard(args.log_dir or args.output_dir))
    if args.output_dir and args.picture_freq:
        observers.append(hooks.Reconstructions(dataset, args.output_dir, args.picture_freq))
    if args.profile_steps:
        observers.append(hooks.Profiler(args.profile_steps, args.output_dir))
    if args.probe_freq:
        observers.append(probe.Probe(args))
    return hooks.Hooks(observers + hooks.saving_hooks(args))  # last: what they keep has been logged


def main(args):
    check_args(args)
    utils.init_distributed_mode(args)
    optim_factory.complete_lr(args)
    utils.prepare_output(args)

    # data
    images = utils.on_all_processes(lambda: datasets.build_pretrain_images(args))
    dataset = datasets.PretrainDataset(
        images, args.input_size, args.num_patches, args.seed, scale=args.scale, hflip=args.hflip
    )
    loader, sampler = datasets.build_train_loader(dataset, args, args.repeated_sampling)

    # model and optimizer
    torch.manual_seed(args.seed)
    model = utils.to_device(build_model(args), args)
    optimizer = torch.optim.AdamW(
        optim_factory.get_parameter_groups(model, args.weight_decay), lr=args.lr, betas=(0.9, 0.95), fused=True
    )
    scaler = utils.loss_scaler(args)
    state = hooks.RunState(args, model, optimizer, scaler, sampler, images)
    resume(state, RUN_FLAGS)
    model = utils.for_training(model, args)

    # configuration
    utils.log_args(args)
    log(f"{args.model}, with the decoder: {describe(build_model, args, loss_only=True)}")
    log(datasets.describe(loader, args))

    # training
    if state.ends_before(state.epoch):
        return log(f"nothing left to do: {state.epoch} of {args.epochs} epochs are done")
    observers = build_hooks(args, dataset)
    observers("on_start", state)
    while not state.ends_before(state.epoch):
        sampler.set_position(state.epoch, state.step)
        observers("on_epoch_start", state)
        train_one_epoch(model, loader, optimizer, scaler, state, observers, args)
        observers("on_evaluate", state)
        state.sum_up()
        observers("on_epoch_end", state)
        state.end_epoch()
    observers("on_end", state)


if __name__ == "__main__":
    utils.run_script(main, utils.FlagParser(description=__doc__.splitlines()[0], parents=[get_args_parser()]))
