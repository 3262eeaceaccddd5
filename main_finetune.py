"""Supervised training of ConvNeXt V2, from an FCMAE checkpoint or from scratch, and evaluation.

    python main_finetune.py --model convnextv2_atto --data_path IMAGES --finetune CHECKPOINT --output_dir OUTPUT
    torchrun --nproc_per_node=8 main_finetune.py @recipes/finetune_base.args --data_path IMAGENET \\
        --finetune CHECKPOINT --output_dir OUTPUT
    python main_finetune.py --model convnextv2_base --eval true --resume CHECKPOINT --data_path IMAGENET

Run the same command again to resume after a stop of any kind.
"""

import flags

import utils  # isort: skip  (before torch)
import contextlib
from functools import partial

import torch

import checkpoints
import datasets
import engine_finetune
import hooks
import loaders
import optim_factory
import tasks
from engine_finetune import evaluate, train_one_epoch
from engine_pretrain import prepare_training, train
from flags import Switch, at_least, fraction, fraction_below_1
from images import find_statistics, statistics_of
from models import convnextv2
from models.cost import describe
from models.weights import check_same_blocks, find_weights, load_backbone, network_config, split_decoder
from resume import find_checkpoint, resume_run, saving_hooks
from run import Run, add_watch_args, check_watch_args, log_configuration
from utils import UserError, log


def get_args_parser():
    parser = flags.FlagParser(add_help=False)
    optim_factory.add_schedule_args(parser, epochs=100, warmup_epochs=20, blr=5e-4, min_lr=1e-6)
    flags.add_model_args(parser, convnextv2.SIZES)

    add = parser.add_argument_group("fine-tuning").add_argument
    add("--drop_path", default=0.0, type=fraction_below_1, help="drop path rate of the last block, from 0 at the first")
    add("--head_init_scale", default=0.001, type=at_least(0.0), help="factor on the initial weights of a new head")
    start = "checkpoint to start from, or timm:NAME for weights that timm downloads; empty: from scratch"
    add("--finetune", default="", metavar="FILE", help=start)
    add("--model_key", default="model|module", help="checkpoint keys to try, separated by |")
    add("--model_prefix", default="", help="prefix of the weights' names in the checkpoint, removed")
    add("--model_ema", default=False, action=Switch, help="keep an EMA of the weights")
    add("--model_ema_decay", default=0.9999, type=fraction, help="EMA decay per optimizer step")
    add("--model_ema_force_cpu", default=False, action=Switch, help="keep the EMA in CPU memory")
    add("--model_ema_eval", default=False, action=Switch, help="evaluate the EMA too; with --eval it alone")

    tasks.add_loss_args(parser)
    optim_factory.add_optimizer_args(parser)
    datasets.add_labelled_args(parser)
    engine_finetune.add_batch_args(parser)
    loaders.add_loader_args(parser, tuple(loaders.ORDERS))
    flags.add_machine_args(parser)
    checkpoints.add_output_args(parser)
    hooks.add_log_args(parser)
    add_watch_args(parser, default="test_acc1, several classes an image test_mAP, mse test_r2, l1 test_mae")
    return parser


def check_args(args):
    """Raise UserError for flags that do not fit each other, before any long work."""
    flags.check_device(args)
    hooks.check_log_args(args)
    if args.eval and args.disable_eval:
        raise UserError("--eval true and --disable_eval true: nothing to do; give one of them")
    if args.eval:
        return  # the rest depends on the checkpoint: see `adopt_training_flags`
    check_data_args(args)
    optim_factory.check_schedule_args(args)
    optim_factory.check_optimizer_args(args)
    engine_finetune.check_batch_args(args)
    if args.model_ema_eval and not args.model_ema:
        raise UserError("--model_ema_eval true: there are no EMA weights without --model_ema true")
    check_task_args(args, [task for task in tasks.TASKS if args.loss in task.losses])


def check_data_args(args):
    flags.check_image_size("input_size", args.input_size, least=8 * args.stem_stride)
    datasets.check_labelled_args(args)


def check_task_args(args, possible):
    """Raise UserError unless the flags fit one of these tasks, or classes of tasks."""
    for task in possible:
        evaluated = [] if args.disable_eval else [f"test_{name}" for name in task.metric_names(args.topk)]
        try:
            task.check_args(args)
            return check_watch_args(args, args.watch or next(iter(evaluated), None), ["train_loss", *evaluated])
        except UserError as error:
            problem = error
    raise problem


def build_model(args, num_classes):
    return convnextv2.__dict__[args.model](
        num_classes=num_classes,
        drop_path_rate=args.drop_path,
        head_init_scale=args.head_init_scale,
        stem_stride=args.stem_stride,
        **flags.network_args(args),
    )


def build_ema(args, model):
    """The exponential moving average of the weights, or None."""
    from timm.utils import ModelEmaV3

    device = "cpu" if args.model_ema_force_cpu else None
    return ModelEmaV3(model, args.model_ema_decay, device=device) if args.model_ema else None


def load_finetune(args, checkpoint, model, task):
    """Start from the weights in --finetune, and report what was loaded and what was not."""
    with utils.name_in_errors(args.finetune):
        check_same_blocks(checkpoint.get("config", {}), model)
        state = find_weights(checkpoint, args.model_key, args.model_prefix)
        check_size(state, model)
        before = tasks.restore_task(checkpoint) or task
        if before.kind != task.kind and "head.weight" in state:
            state = {name: value for name, value in state.items() if not name.startswith("head.")}
            log(f"{args.finetune}: left out the head, of {before.kind}")
        report = load_backbone(model, state)
    for line in report:
        log(f"{args.finetune}: {line}")
    before = checkpoints.training_flags(checkpoint).get("pixel_range")
    if before and list(before) != list(args.pixel_range or ()):
        log(f"{args.finetune}: trained with --pixel_range {before[0]:g} {before[1]:g}, which this run does not give")


def check_size(state, model):
    """Raise ValueError if weights are those of another size of the paper than the model."""
    size = None
    with contextlib.suppress(ValueError):  # of no network at all: `load_backbone` says what is missing
        size = convnextv2.find_size(network_config(split_decoder(state)[0]))
    if size not in (None, convnextv2.find_size(model.config)):
        raise ValueError(f"has the weights of {size}: give --model {size}")


def build_hooks(args):
    observers = hooks.build_loggers(args, training=not args.eval)
    if args.output_dir:
        observers.append(hooks.ClassReport())
    if args.model_ema and not args.eval:
        observers.append(hooks.UpdateEMA())
    return hooks.Hooks(observers + ([] if args.eval else saving_hooks(args)))


def evaluate_models(run, loader, args):
    """{"": the model's `Evaluation`, "_ema": that of the EMA weights, with --model_ema_eval}; None for one given up."""
    models = {"": run.model} | ({"_ema": run.model_ema.module} if args.model_ema_eval else {})
    give_up = run.stop_requested if args.dist_eval else lambda: False
    return {suffix: evaluate(model, loader, run.task, args, give_up) for suffix, model in models.items()}


def find_checkpoint_to_evaluate(args):
    """The checkpoint --resume, else the newest in --output_dir, its path, the network in it, and its task or None."""
    checkpoint, path = find_checkpoint(args.replace(output_dir="") if args.resume else args)
    if checkpoint is None:
        raise UserError("--eval true: give --resume FILE, or an --output_dir with checkpoints")
    key = "model_ema" if args.model_ema_eval else args.model_key
    if args.model_ema_eval and key not in checkpoint:
        raise UserError(f"--model_ema_eval true: {path} has no EMA weights, which --model_ema true keeps")
    with utils.name_in_errors(path):
        state = find_weights(checkpoint, key, args.model_prefix)
        if "head.weight" not in state:
            raise ValueError("has no head: must be a classifier. Load a pre-training checkpoint with --finetune")
        model, _ = convnextv2.from_checkpoint(checkpoint | {"model": state})
        task = tasks.restore_task(checkpoint)
    return checkpoint, path, model, task


# What an evaluation takes from the training of the checkpoint. Some of it, the weights themselves say.
TRAINING_FLAGS = ("model", "in_chans", "stem_stride", "input_size", "crop_pct", "pixel_range", "label_column")
STATISTICS = ("mean", "std", "imagenet_default_mean_and_std")  # which a fine-tuning takes too


def adopt_statistics(args, checkpoint, path):
    """The flags with the pixel statistics of a checkpoint's training, unless the command line has any. It is reported.

    Raises UserError for --mean and --std that do not fit --in_chans.
    """
    training = checkpoints.training_flags(checkpoint)
    with utils.name_in_errors("--mean, --std"):
        given = statistics_of(args)
    if len(training.get("mean") or given[0]) != args.in_chans:
        log(f"{path}: its mean and std are of {len(training['mean'])} channels, and not used")
        return args
    trained = find_statistics(training, args.in_chans)
    ours, theirs = (" ".join(["--mean", *map(str, mean), "--std", *map(str, std)]) for mean, std in (given, trained))
    has_own = args.given & set(STATISTICS)
    if given != trained:
        note = f"NOTE: {ours} differs from the training of {path}: {theirs}"
        log(note if has_own else f"{theirs}, as in the training of {path}")
    return args if has_own else args.replace(**{name: training[name] for name in STATISTICS if name in training})


def adopt_training_flags(args, checkpoint, path, model):
    """The flags of an evaluation: what the command line leaves open is as in the training of the checkpoint.

    A flag that differs is reported. Raises UserError if the weights do not fit it, or for a flag that is out of range.
    """
    shapes = {name: model.config[name] for name in ("in_chans", "stem_stride")}
    shapes["model"] = convnextv2.find_size(model.config) or args.model
    training = checkpoints.training_flags(checkpoint) | shapes
    adopted = {name: training[name] for name in TRAINING_FLAGS if name in training}
    for name in adopted.keys() & args.given:
        given, trained = getattr(args, name), adopted.pop(name)
        if given != trained and name in shapes:
            raise UserError(f"--{name} {given}: {path} has {trained}; leave the flag out")
        if given != trained:
            log(f"NOTE: --{name} {given} differs from the training of {path}: {trained}")
    if adopted.get("label_column", args.label_column) != args.label_column:
        log(f"--label_column {adopted['label_column']}, as in the training of {path}")
    args = adopt_statistics(args.replace(**adopted), checkpoint, path)
    check_data_args(args)
    return args


def evaluate_only(args, device):
    """Evaluate --resume, else the newest checkpoint in --output_dir; no training set is loaded."""
    # checkpoint and data
    checkpoint, path, model, task = find_checkpoint_to_evaluate(args)
    args = adopt_training_flags(args, checkpoint, path, model)
    _, dataset, task = datasets.build_labelled_sets(args, task)
    if model.head.out_features != len(task.names):
        classes = utils.format_count(model.head.out_features, "class")
        raise UserError(f"{path}: has {classes}, the data {len(task.names)}")

    # model
    model = utils.to_device(model, device, args.triton)
    run = Run(args, model, device, images=dataset.images, task=task, hooks=build_hooks(args))
    if "format" in checkpoint:
        run.epoch = checkpoint["epoch"]
    size = " x ".join(map(str, args.eval_size or args.input_size))
    facts = f"{run.n_parameters / 1e6:.1f} M parameters from {path}, {task}, {size} pixels"
    log(f"{args.model}: {facts}")

    # evaluation
    run.hooks("on_start", run)
    loader = loaders.build_eval_loader(dataset, args, device, args.dist_eval)
    run.add_evaluations({"_ema" if args.model_ema_eval else "": evaluate(model, loader, task, args)})
    run.hooks("on_evaluate", run)
    run.hooks("on_epoch_end", run)


def main(args):
    check_args(args)
    device = utils.init_distributed_mode(args)
    checkpoints.prepare_output(args, evaluating=args.eval)
    if args.eval:
        return evaluate_only(args, device)
    optim_factory.peak_lr(args)  # raises UserError

    # what the weights to start from were trained with
    if args.finetune:
        start = utils.on_all_ranks(lambda: checkpoints.load_checkpoint(args.finetune))
        args = adopt_statistics(args, start, args.finetune)

    # data
    dataset, eval_dataset, task = datasets.build_labelled_sets(args)
    check_task_args(args, [task])
    loader, sampler = loaders.build_train_loader(dataset, args, device)
    erasing_fn = engine_finetune.build_erasing(args, device)
    mixup_fn = engine_finetune.build_mixup(args, len(task.names))

    # model and optimizer
    torch.manual_seed(args.seed)
    build = partial(build_model, args, len(task.names))
    model_without_ddp = utils.to_device(build(), device, args.triton)
    if args.finetune:
        utils.on_all_ranks(lambda: load_finetune(args, start, model_without_ddp, task))
        start = None  # which may be large
    model_ema = build_ema(args, model_without_ddp)
    criterion = task.build_loss(args.smoothing, dataset.targets if args.class_weights else None, device)
    optimizer = optim_factory.create_layer_decay_optimizer(args, model_without_ddp)
    watch = args.watch or (None if args.disable_eval else f"test_{task.best}")
    run = Run(
        args, model_without_ddp, device, optimizer, sampler, dataset.images, model_ema, task, watch,
        watch_ema=args.model_ema_eval, hooks=build_hooks(args),
    )  # fmt: skip
    resume_run(run)
    model = prepare_training(model_without_ddp, args)
    cost = describe(build, args.in_chans, args.input_size, args.grad_checkpointing)
    log_configuration(run, f"{task}: {cost}", loader.num_workers)

    # training
    train_epoch = partial(train_one_epoch, model, criterion, loader, run, erasing_fn, mixup_fn)
    if eval_dataset is None:
        return train(run, train_epoch)
    eval_loader = loaders.build_eval_loader(eval_dataset, args, device, args.dist_eval)
    train(run, train_epoch, partial(evaluate_models, run, eval_loader, args))


if __name__ == "__main__":
    flags.run_script(main, get_args_parser(), __doc__)
