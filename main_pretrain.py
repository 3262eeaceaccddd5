"""FCMAE pre-training of ConvNeXt V2 on a folder of images.

    python main_pretrain.py @recipes/demo_digits.args --output_dir output/digits      # a demo, on any machine
    python main_pretrain.py --data_path IMAGES --output_dir OUTPUT                    # one GPU, or the CPU
    torchrun --nproc_per_node=8 main_pretrain.py @recipes/pretrain_imagenet.args --data_path IMAGES --output_dir OUTPUT

Run the same command again to resume after a stop of any kind.
"""

import flags

import utils  # isort: skip  (before torch)
from functools import partial

import torch

import checkpoints
import datasets
import evaluation
import hooks
import loaders
import optim_factory
from engine_pretrain import prepare_training, train, train_one_epoch
from flags import Switch, at_least
from models import fcmae
from models.convnextv2 import SIZES
from models.cost import describe
from resume import resume_run, saving_hooks
from run import Run, add_watch_args, check_watch_args, log_configuration
from utils import UserError


def get_args_parser():
    parser = flags.FlagParser(add_help=False)
    optim_factory.add_schedule_args(parser, epochs=800, warmup_epochs=40, blr=1.5e-4, min_lr=0.0)
    flags.add_model_args(parser, SIZES)

    add = parser.add_argument_group("masked autoencoder").add_argument
    add("--mask_ratio", default=0.6, type=mask_ratio, help="fraction of patches to mask")
    add("--norm_pix_loss", default=True, action=Switch, help="predict patches normalized by their mean and variance")
    add("--decoder_depth", default=1, type=at_least(0, 100), help="blocks of the decoder")
    add("--decoder_embed_dim", default=512, type=at_least(1, 8192), help="channels of the decoder")
    backends = ("packed", "minkowski")
    add("--sparse_backend", default="packed", choices=backends, help="plain PyTorch, or MinkowskiEngine")

    datasets.add_unlabelled_args(parser)
    loaders.add_loader_args(parser, ("full", "blocks"))

    add = parser.add_argument_group("pictures and probes").add_argument
    add("--picture_freq", default=10, type=at_least(0), help="epochs between pictures of reconstructions; 0: none")
    add("--probe_freq", default=0, type=at_least(0), help="epochs between probes of the frozen features; 0: none")
    labelled = "labeled images for the probe: train/ and val/ of class folders; DIGITS: scikit-learn's;"
    add("--probe_data_path", metavar="FOLDER", help=f"{labelled} None: DIGITS with --data_set DIGITS")
    fitted = "images of each class to fit the probe on; 0: all"
    add("--probe_images_per_class", default=0, type=at_least(0), help=fitted)

    flags.add_machine_args(parser)
    checkpoints.add_output_args(parser)
    hooks.add_log_args(parser)
    add_watch_args(parser, default="no best checkpoint")
    return parser


mask_ratio = flags.number(float, lambda ratio: 0 < ratio < 1, "between 0 and 1")


def check_args(args):
    """Raise UserError for flags that do not fit each other, before any long work."""
    unit = 8 * args.stem_stride
    flags.check_image_size("input_size", args.input_size, multiple_of=unit)
    num_patches = (args.input_size[0] // unit) * (args.input_size[1] // unit)
    if not 0 < int(num_patches * (1 - args.mask_ratio)) < num_patches:
        raise UserError(f"--mask_ratio {args.mask_ratio}: must leave and mask at least one of {num_patches} patches")
    flags.check_device(args)
    optim_factory.check_schedule_args(args)
    datasets.check_unlabelled_args(args)
    hooks.check_log_args(args)
    if args.probe_freq and not (args.probe_data_path or args.data_set == "DIGITS"):
        accepted = "train/ and val/ of class folders, or DIGITS"
        raise UserError(f"--probe_freq {args.probe_freq}: give labeled images as --probe_data_path: {accepted}")
    check_watch_args(args, args.watch, ["train_loss", *(evaluation.METRICS if args.probe_freq else [])])


def build_model(args, sparse_backend):
    try:
        return fcmae.__dict__[args.model](
            img_size=args.input_size,
            patch_size=8 * args.stem_stride,
            decoder_depth=args.decoder_depth,
            decoder_embed_dim=args.decoder_embed_dim,
            mask_ratio=args.mask_ratio,
            norm_pix_loss=args.norm_pix_loss,
            sparse_backend=sparse_backend,
            **flags.network_args(args),
        )
    except ImportError as error:
        raise UserError(str(error)) from None


def describe_model(args):
    cost = describe(
        lambda: build_model(args, "packed"),  # MinkowskiEngine's encoder does the same work
        args.in_chans, args.input_size, args.grad_checkpointing, masked_only=True,
    )  # fmt: skip
    return f"with the decoder: {cost}"


def build_hooks(args, dataset, device):
    observers = hooks.build_loggers(args)
    if args.output_dir and args.picture_freq:
        observers.append(hooks.Reconstructions(dataset))
    if args.probe_freq:
        sets = datasets.build_probe_sets(
            args, args.probe_data_path or "DIGITS", args.probe_images_per_class, flag="--probe_data_path"
        )
        observers.append(hooks.Probe([loaders.build_eval_loader(labelled, args, device) for labelled in sets]))
    return hooks.Hooks(observers + saving_hooks(args))


def main(args):
    check_args(args)
    device = utils.init_distributed_mode(args)
    optim_factory.peak_lr(args)  # raises UserError
    checkpoints.prepare_output(args)

    # data
    dataset = datasets.build_pretrain_dataset(args)
    loader, sampler = loaders.build_train_loader(dataset, args, device, args.repeated_sampling)

    # model and optimizer
    torch.manual_seed(args.seed)
    model = utils.to_device(build_model(args, args.sparse_backend), device, args.triton)
    groups = optim_factory.get_parameter_groups(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=optim_factory.peak_lr(args), betas=(0.9, 0.95), fused=True)
    observers = build_hooks(args, dataset, device)
    run = Run(args, model, device, optimizer, sampler, dataset.images, watch=args.watch, hooks=observers)
    resume_run(run)
    model = prepare_training(model, args)
    log_configuration(run, describe_model(args), loader.num_workers)

    # training
    train(run, partial(train_one_epoch, model, loader, run))


if __name__ == "__main__":
    flags.run_script(main, get_args_parser(), __doc__)
