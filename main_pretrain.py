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
from engine_pretrain import train_one_epoch
from models import fcmae
from models.convnextv2 import SIZES
from optim_factory import get_parameter_groups
from utils import UserError, log


def get_args_parser():
    parser = utils.FlagParser(add_help=False)

    utils.add_shared_args(parser, SIZES, epochs=800, warmup_epochs=40, blr=1.5e-4, min_lr=0.0)

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

    group = parser.add_argument_group("pictures")
    group.add_argument(
        "--picture_freq", default=10, type=int, help="epochs between pictures of reconstructions; 0: none"
    )
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
    utils.check_shared_args(args)
    utils.check_least(args, 1, "decoder_embed_dim")
    utils.check_least(args, 0, "decoder_depth picture_freq")
    if not 0 < args.scale[0] <= args.scale[1] <= 1:
        raise UserError(f"--scale {args.scale[0]} {args.scale[1]}: must be above 0, at most 1, the smaller first")
    if not 0 <= args.hflip <= 1:
        raise UserError(f"--hflip {args.hflip}: must be from 0 to 1")
    if args.data_set == "image_folder" and not args.data_path:
        raise UserError("--data_path: give a folder of images, or --data_set DIGITS")
    if args.data_set == "DIGITS" and args.in_chans not in datasets.COLOUR_MODES:
        raise UserError(f"--in_chans {args.in_chans}: must be one of {list(datasets.COLOUR_MODES)} for DIGITS")


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
    "epochs warmup_epochs seed mask_ratio norm_pix_loss lr min_lr weight_decay weight_decay_end clip_grad "
    "data_set data_path scale hflip input_size use_amp amp_dtype effective_batch_size num_images"
).split()


def build_hooks(args, dataset):
    observers = [hooks.UnreadableImages(args.max_bad_images), hooks.Console()]
    if args.output_dir:
        observers.append(hooks.LogFile(args.output_dir))
    if args.log_dir or args.output_dir:
        observers.append(hooks.TensorBoard(args.log_dir or args.output_dir))
    if args.output_dir and args.picture_freq:
        observers.append(hooks.Reconstructions(dataset, args.output_dir, args.picture_freq))
    return hooks.Hooks(observers + hooks.saving_hooks(args))  # last: what they keep has been logged


def main(args):
    check_args(args)
    utils.init_distributed_mode(args)
    utils.complete_lr(args)
    utils.prepare_output(args)

    # data
    images = utils.on_all_processes(lambda: datasets.build_pretrain_images(args))
    dataset = datasets.PretrainDataset(
        images, args.input_size, args.num_patches, args.seed, scale=args.scale, hflip=args.hflip
    )
    loader, sampler = datasets.build_train_loader(dataset, args)

    # model and optimizer
    torch.manual_seed(args.seed)
    model = build_model(args).to(args.device)
    optimizer = torch.optim.AdamW(get_parameter_groups(model, args.weight_decay), lr=args.lr, betas=(0.9, 0.95))
    scaler = torch.amp.GradScaler(args.device.partition(":")[0], enabled=args.use_amp and args.amp_dtype == "float16")
    state = hooks.RunState(args, model, optimizer, scaler, sampler, images)
    hooks.resume(state, RUN_FLAGS)
    if args.compile:
        model = torch.compile(model)
    if args.distributed:
        model = torch.nn.parallel.DistributedDataParallel(model)

    # configuration
    utils.log_args(args)
    log(
        f"{args.model}: {state.n_parameters / 1e6:.1f} M parameters with the decoder; {len(images)} images, "
        f"{sampler.steps_per_epoch} steps of {args.effective_batch_size} an epoch; learning rate up to {args.lr:.2e}; "
        f"{loader.num_workers} loader workers"
    )

    # training
    if state.epoch >= args.epochs:
        return log(f"nothing left to do: {state.epoch} of {args.epochs} epochs are done")
    observers = build_hooks(args, dataset)
    observers("on_start", state)
    while state.epoch < args.epochs:
        sampler.set_position(state.epoch, state.step)
        observers("on_epoch_start", state)
        train_one_epoch(model, loader, optimizer, scaler, state, observers, args)
        observers("on_epoch_end", state)
        state.end_epoch()
    observers("on_end", state)


if __name__ == "__main__":
    utils.run_script(main, utils.FlagParser(description=__doc__.splitlines()[0], parents=[get_args_parser()]))
