"""FCMAE pre-training of ConvNeXt V2 on a folder of images.

    python main_pretrain.py @recipes/demo_digits.args --output_dir output/digits      # a demo, on any machine
    python main_pretrain.py --data_path IMAGES --output_dir OUTPUT                    # one GPU, or the CPU
    torchrun --nproc_per_node=8 main_pretrain.py @recipes/pretrain_imagenet.args --data_path IMAGES --output_dir OUTPUT

Run the same command again to go on after a stop of any kind.
"""

import argparse
import os
import tempfile

import utils  # isort: skip  (before torch)
import torch

import datasets
import hooks
from engine_pretrain import train_one_epoch
from models import fcmae
from models.convnextv2 import SIZES
from optim_factory import get_parameter_groups
from utils import UserError, log, str2bool


def get_args_parser():
    parser = utils.FlagParser(add_help=False)

    group = parser.add_argument_group("training")
    group.add_argument("--batch_size", default=64, type=int, help="images per process and forward pass")
    group.add_argument("--epochs", default=800, type=int, help="passes over the images")
    group.add_argument("--warmup_epochs", default=40, type=int, help="epochs over which the rate rises linearly from 0")
    group.add_argument(
        "--update_freq", default=1, type=int, help="forward passes per optimizer step, to accumulate their gradients"
    )
    group.add_argument("--seed", default=0, type=int, help="decides weights, order, augmentation and masks")
    group.add_argument("--start_epoch", default=0, type=int, help="first epoch, counted from 0, of a new run")

    group = parser.add_argument_group("model")
    group.add_argument("--model", default="convnextv2_base", metavar="NAME", help=f"one of {', '.join(SIZES)}")
    group.add_argument(
        "--input_size",
        default=224,
        type=int,
        nargs="+",
        metavar="PIXELS",
        help="side of the images, or height and width",
    )
    group.add_argument("--in_chans", default=3, type=int, help="channels of the images: 1 reads grey, 3 RGB, 4 RGBA")
    group.add_argument(
        "--stem_stride", default=4, type=int, choices=(1, 2, 4), help="pixels of a site; the mask unit is 8 times that"
    )
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

    group = parser.add_argument_group("optimizer")
    group.add_argument(
        "--lr", default=None, type=float, help="peak learning rate; None: blr x effective batch size / 256"
    )
    group.add_argument("--blr", default=1.5e-4, type=float, help="base learning rate, per 256 images")
    group.add_argument("--min_lr", default=0.0, type=float, help="learning rate at the end")
    group.add_argument("--weight_decay", default=0.05, type=float, help="none on norms, biases, GRN, mask token")

    group = parser.add_argument_group("data")
    group.add_argument(
        "--data_set", default="image_folder", choices=("image_folder", "DIGITS"), help="DIGITS comes with scikit-learn"
    )
    group.add_argument(
        "--data_path", default=None, metavar="FOLDER", help="folder of images, nested or flat; its train/ if it has one"
    )
    group.add_argument("--num_workers", default=10, type=int, help="loader processes, at most one a core; 0: none")
    group.add_argument("--pin_mem", default=True, type=str2bool, help="page-locked batches, faster to copy to a GPU")
    group.add_argument("--max_bad_images", default=100, type=int, help="more unreadable images than this stop the run")

    group = parser.add_argument_group("speed")
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:N or cpu")
    group.add_argument("--use_amp", default=False, type=str2bool, help="automatic mixed precision")
    group.add_argument("--amp_dtype", default="bfloat16", choices=tuple(utils.AMP_DTYPES), help="its type")
    group.add_argument("--compile", action="store_true", help="torch.compile the model")

    group = parser.add_argument_group("checkpoints and logs")
    group.add_argument("--output_dir", default="", metavar="FOLDER", help="for all that is written; empty: nothing is")
    group.add_argument("--log_dir", default=None, metavar="FOLDER", help="for TensorBoard; None: the output folder")
    group.add_argument("--save_ckpt", default=True, type=str2bool, help="write checkpoints")
    group.add_argument("--save_ckpt_freq", default=1, type=int, help="epochs between checkpoints")
    group.add_argument("--save_ckpt_steps", default=0, type=int, help="steps between those within an epoch; 0: none")
    group.add_argument("--save_ckpt_num", default=3, type=int, help="checkpoints kept, of each of the two kinds")
    group.add_argument(
        "--auto_resume", default=True, type=str2bool, help="go on from the newest checkpoint in the output folder"
    )
    group.add_argument(
        "--resume", default="", metavar="FILE", help="checkpoint to start from where the output folder has none"
    )
    group.add_argument("--print_freq", default=20, type=int, help="steps between log lines")
    group.add_argument(
        "--picture_freq", default=10, type=int, help="epochs between pictures of reconstructions; 0: none"
    )

    group = parser.add_argument_group("distributed (torchrun and other launchers set these)")
    group.add_argument("--world_size", default=1, type=int, help="number of processes")
    group.add_argument(
        "--local_rank", "--local-rank", default=-1, type=int, help="number of this process on its machine"
    )
    group.add_argument("--dist_on_itp", default=False, type=str2bool, help="ranks from Open MPI's environment")
    group.add_argument("--dist_url", default="env://", help="where the processes meet")
    return parser


def check_args(args):
    """Complete the flags, or raise UserError for those that cannot work, before anything is loaded."""
    sizes = [args.input_size] if isinstance(args.input_size, int) else args.input_size
    unit = 8 * args.stem_stride
    if len(sizes) > 2 or any(size < unit or size % unit for size in sizes):
        raise UserError(
            f"--input_size {' '.join(map(str, sizes))}: must be one or two multiples of {unit} (8 x --stem_stride)"
        )
    args.input_size = (sizes[0], sizes[-1])
    args.num_patches = (sizes[0] // unit) * (sizes[-1] // unit)
    if args.model not in SIZES:
        raise UserError(f"--model {args.model}: must be one of {', '.join(SIZES)}")
    if not 0 < args.mask_ratio < 1 or not 0 < int(args.num_patches * (1 - args.mask_ratio)) < args.num_patches:
        raise UserError(
            f"--mask_ratio {args.mask_ratio}: must be between 0 and 1, and leave and remove at least one "
            f"of the {args.num_patches} patches"
        )
    for least, names in (
        (1, "batch_size epochs update_freq in_chans decoder_embed_dim save_ckpt_freq save_ckpt_num print_freq"),
        (0, "warmup_epochs seed start_epoch num_workers max_bad_images save_ckpt_steps picture_freq decoder_depth"),
    ):
        for name in names.split():
            if getattr(args, name) < least:
                raise UserError(f"--{name} {getattr(args, name)}: must be at least {least}")
    for name in ("lr", "blr", "min_lr", "weight_decay"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < float("inf"):
            raise UserError(f"--{name} {value}: must be a number from 0 on")
    if args.seed >= 2**63:
        raise UserError(f"--seed {args.seed}: must be less than 2 ** 63")
    if args.start_epoch >= args.epochs:
        raise UserError(f"--start_epoch {args.start_epoch}: must be less than --epochs {args.epochs}")
    if args.data_set == "image_folder" and not args.data_path:
        raise UserError("--data_path: give a folder of images, or --data_set DIGITS")
    if args.data_set == "DIGITS" and args.in_chans not in datasets.COLOUR_MODES:
        raise UserError(f"--in_chans {args.in_chans}: must be one of {list(datasets.COLOUR_MODES)} for DIGITS")
    check_device(args.device)


def check_device(name):
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: must be cpu, cuda or cuda:N")
    gpus = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise UserError(f"--device {name}: {gpus or 'no'} CUDA GPU is visible; --device cpu works")


def prepare_output(args):
    """Make the folders for what is written. Raises UserError if that fails, or if one holds another run's work."""
    if not args.output_dir:
        log("no --output_dir: neither checkpoints nor logs will be written")
    for name in ("output_dir", "log_dir"):
        folder = getattr(args, name)
        if folder:
            try:
                os.makedirs(folder, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
            except OSError as error:
                raise UserError(f"--{name} {folder}: cannot be written: {error.strerror}") from None
    if args.output_dir:
        utils.remove_half_written(args.output_dir)
    if args.output_dir and not args.auto_resume and utils.list_checkpoints(args.output_dir):
        raise UserError(
            f"--output_dir {args.output_dir}: holds the checkpoints of a run; take another, or --auto_resume true"
        )


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


def resume(args, state):
    """Go on from the newest whole checkpoint in the output folder, else start from --resume, else from nothing."""
    checkpoint, path = utils.newest_checkpoint(args.output_dir) if args.output_dir else (None, None)
    if checkpoint is None and args.resume:
        checkpoint, path = utils.load_checkpoint(args.resume), args.resume
    if checkpoint is None:
        return
    utils.load_weights(state.model, checkpoint, path)
    if checkpoint.get("format") is None:
        return log(f"weights from {path}, which another program wrote: training starts at epoch {args.start_epoch}")
    now = vars(args) | {"num_images": state.num_images}
    try:
        state.restore(checkpoint)
        then = checkpoint["args"] | {"num_images": checkpoint["num_images"]}
    except KeyError as error:
        raise UserError(f"{path}: a checkpoint without {error}: cannot be gone on from") from None
    for name in RUN_FLAGS:
        if then.get(name) != now[name]:
            log(f"changed since {path}: {name} {then.get(name)} -> {now[name]}")
            if state.step and name in ("effective_batch_size", "num_images"):
                raise UserError(
                    f"{path}: saved within an epoch at {name.replace('_', ' ')} {then.get(name)}; "
                    f"can only go on with the same, not {now[name]}"
                )
    log(f"goes on from {path}: epoch {state.epoch}, step {state.step}")


# What decides a run's numbers: a resumed run says if it changed.
RUN_FLAGS = (
    "epochs warmup_epochs seed mask_ratio norm_pix_loss lr min_lr weight_decay data_set data_path "
    "input_size use_amp amp_dtype effective_batch_size num_images"
).split()


def build_hooks(args, dataset):
    observers = [hooks.UnreadableImages(args.max_bad_images), hooks.Console()]
    if args.output_dir:
        observers.append(hooks.LogFile(args.output_dir))
    if args.log_dir or args.output_dir:
        observers.append(hooks.TensorBoard(args.log_dir or args.output_dir))
    if args.output_dir and args.picture_freq:
        observers.append(hooks.Reconstructions(dataset, args.output_dir, args.picture_freq))
    if args.output_dir and args.save_ckpt:
        observers.append(hooks.Checkpointer())  # last: what it keeps has been logged
    return hooks.Hooks(observers)


def main(args):
    check_args(args)
    utils.init_distributed_mode(args)
    args.effective_batch_size = args.batch_size * args.update_freq * utils.get_world_size()
    if args.lr is None:
        args.lr = args.blr * args.effective_batch_size / 256
    if args.min_lr > args.lr:
        raise UserError(f"--min_lr {args.min_lr}: must not be more than the peak learning rate {args.lr:g}")
    prepare_output(args)

    # data
    images = datasets.build_pretrain_images(args)
    dataset = datasets.PretrainDataset(images, args.input_size, args.num_patches, args.seed)
    loader, sampler = datasets.build_pretrain_loader(dataset, args)

    # model and optimizer
    torch.manual_seed(args.seed)
    model = model_without_ddp = build_model(args).to(args.device)
    optimizer = torch.optim.AdamW(get_parameter_groups(model, args.weight_decay), lr=args.lr, betas=(0.9, 0.95))
    scaler = torch.amp.GradScaler(args.device.partition(":")[0], enabled=args.use_amp and args.amp_dtype == "float16")
    state = hooks.RunState(args, model_without_ddp, optimizer, scaler, sampler.steps_per_epoch, len(images))
    resume(args, state)
    if args.compile:
        model = torch.compile(model)
    if args.distributed:
        model = torch.nn.parallel.DistributedDataParallel(model)

    # configuration
    for name, value in sorted(vars(args).items()):
        log(f"  {name}: {value}")
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
