"""Time training and measure its memory: the project's models beside their alternatives, in one process.

    python -m tools.benchmark                              # atto and tiny, whole steps, GPU if there is one
    python -m tools.benchmark --part encoder --device cpu  # only the encoder, forward and backward
    python -m tools.benchmark --part finetune              # steps of supervised training, beside timm's model
    python -m tools.benchmark --part loader                # from JPEG files to batches, on one core
    python -m tools.benchmark --model convnextv2_base --batch_size 256 --dtype bfloat16 --compile
    python -m tools.benchmark --json > benchmark.json      # the same figures and every single time

The contestants are described in tools/contestants.py and tools/loaders.py. A round times one step of each in turn; the
first two rounds do not count. Settings are those of a training: float32 on CUDA is TF32. "x packed", "x dense": time
divided by packed's or dense's in the same round, median over rounds; 2.00 takes twice as long. "x original": 2.00
delivers twice as many images. The floor is visible / total patches. Peak memory is that of the third step in a fresh
process: on CUDA of all tensors, on the CPU (Linux) the rise of the resident memory during the step, without weights and
optimizer state.
"""

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
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib import metadata
from pathlib import Path

import torch

import flags
from flags import Switch, at_least
from models.convnextv2 import SIZES
from tools import contestants
from tools.contestants import PATCH
from utils import UserError

WARM_UP = 2  # rounds
# Default batch size on the CPU, 4 for the other sizes; 32 times that on a GPU
BATCH_SIZE = dict.fromkeys(["atto", "femto", "pico", "nano"], 8) | {"base": 2, "large": 1, "huge": 1}


def time_ms(step, device):
    """Milliseconds that one step takes, on a GPU between two CUDA events."""
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


def attempt(row, function, *arguments):
    """The function's result; if it fails, None, and the row says why."""
    try:
        return function(*arguments)
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def measure_peak(model, contestant, batch_size, args):
    """Peak memory of a step in MiB, see the top of this file, for a fresh process. None where it cannot be read."""
    step = contestants.make_step(model, contestant, batch_size, args)
    for _ in range(WARM_UP):
        step()
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return round(torch.cuda.max_memory_allocated() / 2**20)
    if not sys.platform.startswith("linux"):
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier steps freed returns to the system
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    before = read_status("VmRSS")
    step()
    return round((read_status("VmHWM") - before) / 2**10)


def read_status(field):  # KiB
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def make_row(model, contestant, batch_size, args):
    row = dict(contestant=contestant, times_ms=[])
    row["peak_mib"] = attempt(row, measure_peak, model, contestant, batch_size, args)
    return row


def make_row_in_fresh_process(model, contestant, batch_size, args):
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(make_row, model, contestant, batch_size, args).result()
        except BrokenProcessPool:
            return dict(contestant=contestant, times_ms=[], peak_mib=None, error="its process died: out of memory?")


def time_rounds(rows, steps, batch_size, args):
    """Time a step of each contestant, round by round, and add the figures to its row. One that fails is dropped."""
    for i in range(WARM_UP + args.rounds):
        for name in list(steps):
            contestants.choose_kernels(name, args.device)
            ms = attempt(rows[name], time_ms, steps[name], args.device)
            if ms is None:
                del steps[name]  # and with it its memory
            elif i >= WARM_UP:
                rows[name]["times_ms"].append(ms)
    reference = next(iter(rows))
    for name in steps:
        times, ratio = rows[name]["times_ms"], None
        if reference in steps:
            pairs = zip(times, rows[reference]["times_ms"], strict=True)
            ratio = round(statistics.median(b / a if args.part == "loader" else a / b for a, b in pairs), 2)
        median = statistics.median(times)
        images_per_s = round(1e3 * batch_size / median, 1)
        rows[name] |= {"median_ms": round(median, 2), "images_per_s": images_per_s, f"times_{reference}": ratio}


def compare_models(args):
    """Yield, for each --model, a dict with a row for each contestant."""
    names = args.only or contestants.choose_contestants(args)[0]
    scale = 32 if args.device == "cuda" else 1
    sizes = args.batch_size or [scale * BATCH_SIZE.get(model.split("_")[1], 4) for model in args.model]
    for model, batch_size in zip(args.model, sizes * (len(args.model) // len(sizes)), strict=True):
        torch.compiler.reset()
        # Memory first, before anything of this process is on the device
        rows = {name: make_row_in_fresh_process(model, name, batch_size, args) for name in names}
        fit = [name for name, row in rows.items() if "error" not in row]
        steps = {name: attempt(rows[name], contestants.make_step, model, name, batch_size, args) for name in fit}
        steps = {name: step for name, step in steps.items() if step}
        time_rounds(rows, steps, batch_size, args)
        steps.clear()  # and with them the models
        yield dict(model=model, batch_size=batch_size, contestants=list(rows.values()))


def compare_loaders(args):
    """Yield, for each size of files and training, a dict with a row for each contestant."""
    from tools import loaders

    for size, count in loaders.COUNTS.items():
        with tempfile.TemporaryDirectory() as folder:
            loaders.draw_jpegs(Path(folder) / "photographs", count, size)
            for training in ("pre-training", "fine-tuning"):
                steps = loaders.make_steps(training, Path(folder), args.input_size)
                rows = {name: dict(contestant=name, times_ms=[]) for name in steps}
                time_rounds(rows, steps, count, args)
                files = "{}, JPEGs of {} x {}".format(training, *size)
                yield dict(files=files, batch_size=count, contestants=list(rows.values()))


def measure_ceilings(args):
    """Upper bounds of any step: GB/s, read and written, of a large copy, and TFLOP/s of a large matrix product."""
    side = 8192 if args.device == "cuda" else 2048
    a = torch.randn(side, side, device=args.device, dtype=getattr(torch, args.dtype))
    b = torch.empty_like(a)
    copy_ms = statistics.median(time_ms(lambda: b.copy_(a), args.device) for _ in range(10))
    product_ms = statistics.median(time_ms(lambda: a @ a, args.device) for _ in range(10))
    gigabytes, flops = 2 * a.nbytes / 1e6 / copy_ms, 2 * side**3 / 1e9 / product_ms
    return {"copy GB/s": round(gigabytes, 1), f"{args.dtype} product TFLOP/s": round(flops, 3)}


def describe_conditions(args):
    """The conditions of the measurement and, for masked models, the floor: the head of the report."""
    cpuinfo = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text() if cpuinfo.exists() else "")
    machine = dict(
        gpu=torch.cuda.get_device_name() if args.device == "cuda" else "no GPU used",
        cpu=cpu[1] if cpu else platform.processor(),
        cores=os.cpu_count(),
        torch_threads=torch.get_num_threads(),
        load_average=round(os.getloadavg()[0], 1),  # well above 0: other programs are running, distrust the times
    )
    versions = {name: metadata.version(name) for name in ("torch", "torchvision", "pillow")}
    versions["python"] = platform.python_version()
    installed = [*metadata.distributions(name="MinkowskiEngine")]
    versions["MinkowskiEngine"] = installed[0].version if installed else "not installed"
    keys = ("part", "device", "input_size", "rounds") + ("dtype", "mask_ratio") * (args.part != "loader")
    settings = {key: getattr(args, key) for key in keys} | dict(warm_up=WARM_UP)
    report = dict(machine=machine, versions=versions, settings=settings)
    if args.part != "loader":
        report["ceilings"] = measure_ceilings(args)
    if args.part in ("encoder", "step"):
        patches, visible = contestants.count_patches(args)
        report["floor"] = dict(visible=visible, patches=patches, ratio=visible / patches)
        report["left_out"] = contestants.choose_contestants(args)[1]
    return report


def print_header(report):
    for title in ("machine", "versions", "settings", "ceilings"):
        if title in report:
            print(f"{title}: " + ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in report[title].items()))
    if "floor" in report:
        floor = "floor: {visible}/{patches} patches visible = {ratio:.2f} of dense unmasked's encoder"
        print(floor.format(**report["floor"]))
        for contestant, reason in report["left_out"].items():
            print(f"{contestant} left out: {reason}")


def print_table(result):
    title, reference = result.get("model") or result["files"], result["contestants"][0]["contestant"]
    print(f"\n{title}, batch size {result['batch_size']}")
    print(f"{'':24}{'median ms':>10}{'min - max':>18}{'images/s':>10}{f'x {reference}':>12}{'peak MiB':>10}")
    for row in result["contestants"]:
        name = row["contestant"]
        if "error" in row:
            print(f"{name:24}  failed: {row['error']}")
            continue
        spread = f"{min(row['times_ms']):.1f} - {max(row['times_ms']):.1f}"
        ratio = "-" if row[f"times_{reference}"] is None else f"{row[f'times_{reference}']:.2f}"
        peak = row.get("peak_mib") or "-"
        print(f"{name:24}{row['median_ms']:>10.1f}{spread:>18}{row['images_per_s']:>10}{ratio:>12}{peak:>10}")


def get_args_parser():
    parser = flags.FlagParser(add_help=False)
    add = parser.add_argument_group("what to time").add_argument
    models = ["convnextv2_atto", "convnextv2_tiny"]
    add("--model", nargs="+", default=models, choices=SIZES, metavar="NAME", help="one or more")
    add("--batch_size", nargs="+", type=at_least(1), help="one, or one per model; None: by model and device")
    add("--input_size", default=224, type=at_least(PATCH), help="side of the images, a multiple of 32")
    add("--mask_ratio", default=0.6, type=flags.fraction_below_1, help="fraction of patches to mask")
    parts = ("encoder", "step", "finetune", "loader")
    add("--part", choices=parts, default="step", help="encoder: forward and backward; loader: on one core")
    add("--only", nargs="+", metavar="NAME", help="contestants to time; None: all")

    add = parser.add_argument_group("how to time").add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=("cuda", "cpu"), default=device, help="--part loader: always the CPU")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of autocast")
    add("--compile", action=Switch, default=False, help="time under torch.compile as well")
    add("--rounds", default=10, type=at_least(1), help="rounds that count")
    add("--json", action=Switch, default=False, help="print one JSON object instead of tables")
    return parser


def check_args(args):
    """Raise UserError for flags that do not fit together or this machine."""
    flags.check_image_size("input_size", (args.input_size,), multiple_of=PATCH)
    flags.check_device(args)
    if args.batch_size is not None and len(args.batch_size) not in (1, len(args.model)):
        raise UserError(f"--batch_size {' '.join(map(str, args.batch_size))}: must be one, or one for each --model")
    if args.part == "loader":
        return
    contestants.count_patches(args)
    names, _ = contestants.choose_contestants(args)
    if args.only and not set(args.only) <= set(names):
        raise UserError(f"--only {', '.join(args.only)}: must be among {', '.join(names)}")


def main(args):
    check_args(args)
    loader = args.part == "loader"
    if loader:
        torch.set_num_threads(1)  # as DataLoader's workers have
        args = Namespace(**vars(args) | {"device": "cpu"})
    report = describe_conditions(args)
    if not args.json:
        print_header(report)
    results = report["files" if loader else "models"] = []
    for result in compare_loaders(args) if loader else compare_models(args):
        results.append(result)
        if not args.json:
            print_table(result)
    if args.json:
        print(json.dumps(report, indent=1))


if __name__ == "__main__":
    flags.run_script(main, get_args_parser(), __doc__)
