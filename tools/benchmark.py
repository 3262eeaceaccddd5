"""Speed and memory of training: the project's models beside their alternatives, in one process.

    python -m tools.benchmark                              # atto and tiny, whole steps, GPU if there is one
    python -m tools.benchmark --part encoder --device cpu  # only the encoder, forward and backward
    python -m tools.benchmark --part finetune              # a step of supervised training, beside timm's model
    python -m tools.benchmark --part loader                # from JPEG files to batches, on one core
    python -m tools.benchmark --model convnextv2_base --batch_size 256 --dtype bfloat16 --compile
    python -m tools.benchmark --json > benchmark.json      # the same figures and every single time

Contestants, each with its own model and optimizer, all with the same initial weights:

    packed            the project's FCMAE
    packed compiled   the same under torch.compile(fullgraph=True), with --compile
    packed triton     with depthwise convolutions by models/kernels.py, on CUDA with --triton; also compiled
    dense masked      its encoder computes every site and masks it: tools/dense_masked.py
    dense unmasked    its encoder is the fine-tuning network, on the whole image: what masking should save; also
                      compiled, with --compile
    minkowski         its encoder runs on MinkowskiEngine, where that is installed

and of --part finetune, steps of a classifier of 1000 classes with label smoothing:

    dense             the project's ConvNeXtV2, channels last; also compiled, triton, compiled triton, as above
    timm              timm's model of that name as it comes, (N, C, H, W); also channels last, and that compiled

A round times one step of each in turn (A B C D, A B C D, ...), so that a slow moment of the machine strikes all alike;
the first two rounds, which compile and allocate, do not count. Float32 means float32: no TF32. "x packed" is a
contestant's time over packed's in the same round, median over rounds: 2.00 takes twice as long ("x dense" likewise).
The floor is visible / total patches: no masked encoder can do with less of the unmasked one's work.

Peak memory is that of the third step in a fresh process of the contestant's own. CUDA: all that tensors hold, weights
and optimizer state included (torch.cuda.max_memory_allocated). CPU, on Linux: how far the process's resident memory
rises during the step (VmHWM less VmRSS before), that is activations, gradients and workspace; weights and optimizer
state are older, and the same for all. An error in one contestant stands in its row; the others go on.

The contestants of --part loader are in tools/loaders.py: the original's transform, this project's loader, and for
pre-training the same with 4 crops an image. "x original" is the original's time over a contestant's: 2.00 delivers
twice as many images.
"""

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import platform
import re
import statistics
import sys
import tempfile
import time
import warnings
from importlib import metadata
from pathlib import Path

import utils  # isort: skip  # noqa: F401  (before torch: sets how threads wait)
import timm
import torch
from timm.loss import LabelSmoothingCrossEntropy
from torch import nn

from models import convnextv2, fcmae
from models.checkpoints import to_timm
from models.utils import use_triton
from tools.dense_masked import DenseMasked
from utils import keep_freed_memory

warnings.filterwarnings("ignore", module="MinkowskiEngine")  # it warns on import where it was built without CUDA
WARM_UP = 2
PATCH = 32
# Batch size on the CPU unless --batch_size says otherwise, 4 for the rest; on a GPU 32 times that
BATCH_SIZE = dict.fromkeys(["atto", "femto", "pico", "nano"], 8) | {"base": 2, "large": 1, "huge": 1}


class DenseUnmasked(nn.Module):
    """The dense, channels-last trunk on the whole image: (N, 3, H, W) -> (N, C, h, w). It ignores the mask."""

    grad_checkpointing = False

    def __init__(self, trunk):
        super().__init__()
        self.downsample_layers, self.stages = trunk.downsample_layers, trunk.stages

    def forward(self, imgs, mask, num_visible=None):
        return convnextv2.ConvNeXtV2.forward_trunk(self, imgs)


def build_classifier(name, contestant):
    """The classifier of that name: this project's, or timm's; the weights are the same for every contestant."""
    torch.manual_seed(0)
    model = getattr(convnextv2, name)(num_classes=1000)
    if not contestant.startswith("timm"):
        return model
    theirs = timm.create_model(name, num_classes=1000)
    theirs.load_state_dict(to_timm(model.state_dict()))
    return theirs.to(memory_format=torch.channels_last) if "channels last" in contestant else theirs


def build(name, contestant, input_size):
    """The FCMAE of that name with the contestant's encoder; the weights are the same for every contestant."""
    torch.manual_seed(0)
    model = getattr(fcmae, name)(img_size=input_size)
    if contestant == "minkowski":
        other = getattr(fcmae, name)(img_size=input_size, sparse_backend="minkowski")
        other.load_state_dict(model.state_dict())
        return other
    if contestant == "dense masked":
        model.encoder = DenseMasked(model.encoder)
    elif contestant.startswith("dense unmasked"):
        dense = DenseUnmasked(getattr(convnextv2, name)(num_classes=1))
        dense.load_state_dict(model.encoder.state_dict())
        model.encoder = dense
    return model


def make_step(name, contestant, batch_size, args):
    """A function without arguments that runs what --part says once, on one fixed batch of noise."""
    if args.device == "cpu":
        keep_freed_memory()  # as the scripts do
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # the default for matrix products; convolutions would have an advantage
    use_triton("triton" in contestant)
    if args.part == "finetune":
        return make_finetune_step(build_classifier(name, contestant).to(args.device), contestant, batch_size, args)
    model = build(name, contestant, args.input_size).to(args.device)
    imgs = torch.randn(batch_size, 3, args.input_size, args.input_size, device=args.device)
    compiled = "compiled" in contestant
    if args.part == "encoder":
        dtype = getattr(torch, args.dtype)
        autocast = torch.autocast(args.device, dtype, enabled=dtype != torch.float32)
        mask = model.gen_random_mask(imgs, args.mask_ratio)
        encoder, grid = model.encoder, args.input_size // PATCH
        cotangent = torch.randn(batch_size, model.proj.in_channels, grid, grid, device=args.device)
        forward = torch.compile(encoder, fullgraph=True) if compiled else encoder

        def step():
            with autocast:
                latent = forward(imgs, mask, num_visible=args.visible)
            latent.backward(cotangent.to(latent.dtype))
            encoder.zero_grad(set_to_none=True)

        return step

    forward = torch.compile(model, fullgraph=True) if compiled else model
    return make_update(model, lambda: forward(imgs, mask_ratio=args.mask_ratio, loss_only=True)[0], args)


def make_finetune_step(model, contestant, batch_size, args):
    """A step of supervised training on one fixed batch of noise."""
    imgs = torch.randn(batch_size, 3, args.input_size, args.input_size, device=args.device)
    if "channels last" in contestant:
        imgs = imgs.contiguous(memory_format=torch.channels_last)
    targets = torch.arange(batch_size, device=args.device)
    criterion = LabelSmoothingCrossEntropy(0.1)
    forward = torch.compile(model) if "compiled" in contestant else model
    return make_update(model, lambda: criterion(forward(imgs).float(), targets), args)


def make_update(model, compute_loss, args):
    """A function without arguments: forward, backward and AdamW, as the engines do it."""
    dtype = getattr(torch, args.dtype)
    autocast = torch.autocast(args.device, dtype, enabled=dtype != torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    scaler = torch.amp.GradScaler(args.device, enabled=dtype == torch.float16)

    def step():
        with autocast:
            loss = compute_loss()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


def time_ms(step, device):
    """Milliseconds that one step takes."""
    if device == "cpu":
        start = time.perf_counter()
        step()
        return round(1e3 * (time.perf_counter() - start), 3)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    step()
    end.record()
    end.synchronize()
    return round(start.elapsed_time(end), 3)


def peak_mib(name, contestant, batch_size, args):
    """Peak memory of a step in MiB as at the top of this file, for a process of its own; None where unreadable."""
    step = make_step(name, contestant, batch_size, args)
    for _ in range(WARM_UP):
        step()
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return round(torch.cuda.max_memory_allocated() / 2**20)
    if not sys.platform.startswith("linux"):
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier steps freed goes back to the system
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    before = status_kib("VmRSS")
    step()
    return round((status_kib("VmHWM") - before) / 2**10)


def status_kib(field):
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def attempt(row, function, *arguments):
    """What the function returns; if it fails, None, and the row says why. The other contestants go on."""
    try:
        return function(*arguments)
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        return None


def send_memory(connection, *arguments):
    """`peak_mib` for the process at the other end."""
    row = {}
    row["peak_mib"] = attempt(row, peak_mib, *arguments)
    connection.send(row)


def memory_alone(*arguments):
    """`peak_mib` in a fresh process, as part of a row: peak_mib, and error if it failed."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send_memory, args=(sender, *arguments), daemon=True)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()  # for its exit code
        return dict(peak_mib=None, error=f"its process died with exit code {process.exitcode} (-9: out of memory?)")
    finally:
        process.join()


def compare(name, contestants, batch_size, args):
    """Measure one model: a dict with a row for each contestant."""
    torch.compiler.reset()
    rows = {c: dict(contestant=c, times_ms=[]) for c in contestants}
    steps = {}
    for c, row in rows.items():  # before anything of this process is on the device
        row |= memory_alone(name, c, batch_size, args)
    for c, row in rows.items():
        step = None if "error" in row else attempt(row, make_step, name, c, batch_size, args)
        if step is not None:
            steps[c] = step
    time_rounds(rows, steps, args)
    add_figures(rows, steps, batch_size)
    first = contestants[0]
    for c in steps:
        rows[c][f"times_{first}"] = median_ratio(rows[c], rows[first]) if first in steps else None
    return dict(model=name, batch_size=batch_size, contestants=list(rows.values()))


def compare_loaders(args):
    """Measure loading, for each size of files: a dict with a row for each contestant."""
    from tools import loaders  # only here: it takes seconds, and each process of memory_alone imports this file

    for size, count in loaders.COUNTS.items():
        with tempfile.TemporaryDirectory() as folder:
            loaders.draw_jpegs(Path(folder) / "photographs", count, size)
            for training, make_steps in loaders.MAKE_STEPS.items():
                steps = make_steps(folder, args.input_size)
                rows = {c: dict(contestant=c, times_ms=[]) for c in steps}
                time_rounds(rows, steps, args)
                add_figures(rows, steps, count)
                for c in steps:
                    rows[c]["times_original"] = median_ratio(rows["original"], rows[c]) if "original" in steps else None
                files = "{}, JPEGs of {} x {}".format(training, *size)
                yield dict(files=files, batch_size=count, contestants=list(rows.values()))


def time_rounds(rows, steps, args):
    """Time a step of each contestant, round by round, into its row. One that fails is taken from steps."""
    for i in range(WARM_UP + args.rounds):
        for c in list(steps):
            use_triton("triton" in c)
            ms = attempt(rows[c], time_ms, steps[c], args.device)
            if "error" in rows[c]:
                del steps[c]  # and with it its memory
            elif i >= WARM_UP:
                rows[c]["times_ms"].append(ms)


def add_figures(rows, steps, batch_size):
    """Median and images/s of each contestant that did not fail."""
    for c in steps:
        median = statistics.median(rows[c]["times_ms"])
        rows[c] |= dict(median_ms=round(median, 2), images_per_s=round(1e3 * batch_size / median, 1))


def median_ratio(row, other):
    """How many times as long a row took as another in the same round, median over rounds."""
    return round(statistics.median(a / b for a, b in zip(row["times_ms"], other["times_ms"], strict=True)), 2)


def ceilings(args):
    """What no step can exceed: GB/s, read and written, of a large copy and TFLOP/s of a large matrix product."""
    side = 8192 if args.device == "cuda" else 2048
    a = torch.randn(side, side, device=args.device, dtype=getattr(torch, args.dtype))
    b = torch.empty_like(a)
    copy_ms, product_ms = (
        statistics.median(time_ms(work, args.device) for _ in range(10)) for work in (lambda: b.copy_(a), lambda: a @ a)
    )
    gigabytes, flops = 2 * a.nbytes / 1e6 / copy_ms, 2 * side**3 / 1e9 / product_ms
    return {"copy GB/s": round(gigabytes, 1), f"{args.dtype} product TFLOP/s": round(flops, 3)}


def describe(args):
    """The conditions of the measurement, as for --json."""
    cpuinfo = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text() if cpuinfo.exists() else "")
    machine = dict(
        gpu=torch.cuda.get_device_name() if args.device == "cuda" else "no GPU used",
        cpu=cpu[1] if cpu else platform.processor(),
        cores=os.cpu_count(),
        torch_threads=torch.get_num_threads(),
        load_average=round(os.getloadavg()[0], 1),  # well above 0: others are at work here, distrust the times
    )
    try:
        minkowski = metadata.version("MinkowskiEngine")
    except metadata.PackageNotFoundError:
        minkowski = "not installed"
    versions = {name: metadata.version(name) for name in ("torch", "torchvision", "pillow")}
    versions |= dict(python=platform.python_version(), MinkowskiEngine=minkowski)
    keys = ("part", "device", "input_size", "rounds") + ("dtype", "mask_ratio") * (args.part != "loader")
    settings = {key: getattr(args, key) for key in keys} | dict(warm_up=WARM_UP)
    report = dict(machine=machine, versions=versions, settings=settings)
    return report | (dict(ceilings=ceilings(args)) if args.part != "loader" else {})


def print_header(report):
    """Machine, versions and settings, a line each, and for models the floor."""
    for title in ("machine", "versions", "settings", "ceilings"):
        if title not in report:
            continue
        print(f"{title}: " + ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in report[title].items()))
    if "floor" in report:
        visible, patches, ratio = report["floor"].values()
        print(f"floor: {visible}/{patches} patches visible = {ratio:.2f} of dense unmasked's encoder")
        for contestant, why in report["left_out"].items():
            print(f"{contestant} left out: {why}")


def print_table(result):
    title, reference = result.get("model") or result["files"], result["contestants"][0]["contestant"]
    print(f"\n{title}, batch size {result['batch_size']}")
    print(f"{'':24}{'median ms':>10}{'min - max':>18}{'images/s':>10}{f'x {reference}':>12}{'peak MiB':>10}")
    for row in result["contestants"]:
        if "error" in row:
            print(f"{row['contestant']:24}  failed: {row['error']}")
            continue
        spread = f"{min(row['times_ms']):.1f} - {max(row['times_ms']):.1f}"
        ratio = "-" if row[f"times_{reference}"] is None else f"{row[f'times_{reference}']:.2f}"
        peak = row.get("peak_mib") or "-"
        print(
            f"{row['contestant']:24}{row['median_ms']:>10.1f}{spread:>18}{row['images_per_s']:>10}{ratio:>12}{peak:>10}"
        )


def why_no_minkowski(args):
    """Why MinkowskiEngine cannot take part; None if it can."""
    if args.dtype != "float32":
        return f"it computes in float32 only, not in {args.dtype}"
    try:
        from models.convnextv2_minkowski import ME
    except ImportError as error:
        return str(error).splitlines()[0]
    return None if args.device == "cpu" or ME.is_cuda_available() else "this MinkowskiEngine was built without CUDA"


def get_args_parser():
    parser = argparse.ArgumentParser(
        prog="python -m tools.benchmark",
        description="Time pre-training, packed beside its alternatives.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    work = parser.add_argument_group("what is timed")
    models = ["convnextv2_atto", "convnextv2_tiny"]
    work.add_argument("--model", nargs="+", default=models, choices=convnextv2.SIZES, metavar="M", help="one or more")
    work.add_argument("--batch_size", nargs="+", type=int, help="one, or one a model; None: by model and device")
    work.add_argument("--input_size", type=int, default=224, help="side of the images, a multiple of 32")
    work.add_argument("--mask_ratio", type=float, default=0.6, help="part of the patches that is removed")
    parts = ("encoder", "step", "finetune", "loader")
    work.add_argument("--part", choices=parts, default="step", help="encoder: forward, backward; loader: see the top")
    work.add_argument("--only", nargs="+", metavar="NAME", help="contestants, as they are named at the top; None: all")
    how = parser.add_argument_group("how")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    how.add_argument("--device", choices=("cuda", "cpu"), default=device, help="where to run")
    how.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of autocast")
    how.add_argument("--compile", action="store_true", help="time under torch.compile as well")
    how.add_argument("--triton", action="store_true", help="time with this project's Triton kernels as well; CUDA")
    how.add_argument("--rounds", type=int, default=10, help="rounds that count")
    how.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    return parser


def parse_args():
    """The checked arguments, with a batch size for each model and the number of patches, all and visible."""
    parser = get_args_parser()
    args = parser.parse_args()
    if args.input_size < PATCH or args.input_size % PATCH:
        parser.error(f"--input_size {args.input_size}: must be a multiple of {PATCH}")
    args.patches = (args.input_size // PATCH) ** 2
    try:
        args.visible = fcmae.FCMAE.num_visible(None, args.patches, args.mask_ratio)
    except ValueError as error:
        parser.error(f"--{error}")
    if args.part == "loader":
        args.device = "cpu"
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: must be at least 1")
    if args.triton and args.device == "cpu":
        parser.error("--triton: the kernels are for --device cuda")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
    if args.batch_size is None:
        scale = 32 if args.device == "cuda" else 1
        args.batch_size = [scale * BATCH_SIZE.get(name.split("_")[1], 4) for name in args.model]
    if len(args.batch_size) not in (1, len(args.model)) or min(args.batch_size) < 1:
        parser.error(f"--batch_size {args.batch_size}: must be one, or one for each --model, and above 0")
    if len(args.batch_size) == 1:
        args.batch_size *= len(args.model)
    if args.part != "loader":
        args.contestants, args.left_out = choose_contestants(args)
        if args.only and not set(args.only) <= set(args.contestants):
            parser.error(f"--only {', '.join(args.only)}: must be among {', '.join(args.contestants)}")
        args.contestants = args.only or args.contestants
    return args


def choose_contestants(args):
    """Those of --part, the reference first; and for each that cannot take part the reason."""
    own = "dense" if args.part == "finetune" else "packed"
    contestants = [own] + [f"{own} compiled"] * args.compile + [f"{own} triton"] * args.triton
    contestants += [f"{own} compiled triton"] * (args.compile and args.triton)
    if args.part == "finetune":
        return contestants + ["timm", "timm channels last"] + ["timm channels last compiled"] * args.compile, {}
    why = why_no_minkowski(args)
    contestants += ["dense masked", "dense unmasked"] + ["dense unmasked compiled"] * args.compile
    contestants += ["minkowski"] * (why is None)
    return contestants, {"minkowski": why} if why else {}


def main():
    args = parse_args()
    if args.part == "loader":
        torch.set_num_threads(1)  # as DataLoader's workers have
        report, kind, results = describe(args), "files", compare_loaders(args)
    else:
        report, kind = describe(args), "models"
        if args.part != "finetune":
            floor = dict(visible=args.visible, patches=args.patches, ratio=args.visible / args.patches)
            report |= dict(floor=floor, left_out=args.left_out)
        models = zip(args.model, args.batch_size, strict=True)
        results = (compare(name, args.contestants, batch_size, args) for name, batch_size in models)
    if not args.json:
        print_header(report)
    report[kind] = []
    for result in results:
        report[kind].append(result)
        if not args.json:
            print_table(result)
    if args.json:
        print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
