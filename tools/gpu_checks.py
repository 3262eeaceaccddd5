"""The checks of `tools.gpu_report`: each measures one thing about a GPU, or in small about a CPU; args -> dict."""

import contextlib
import functools
import importlib
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves

from models import fcmae, triton_switch
from tools import benchmark, contestants
from utils import to_device

CLASSES = dict(  # of kernels, by their names: of Triton, cuBLAS and cuDNN
    gemm="gemm|gemv|nvjet|cutlass|xmma|splitK|aten::.*mm",
    depthwise="_conv_kernel|_weight_grad_kernel|(conv|dgrad|wgrad)2d|conv_depthwise",
    mlp="gelu",
)


def settings(args, **changes):
    """What `contestants.make_step` reads, for a real report; for a dry one all is small."""
    real = dict(device="cuda", input_size=224, dtype="bfloat16", model="convnextv2_base", batch_size=256, steps=20)
    small = dict(device="cpu", input_size=64, dtype="float32", model="convnextv2_atto", batch_size=2, steps=2)
    return Namespace(**dict(mask_ratio=0.6, part="step", compile=True) | real | changes | (small if args.dry else {}))


def times_ms(step, device, count, warm_up):
    """The milliseconds of `count` steps after some of warm-up."""
    return [benchmark.time_ms(step, device) for _ in range(warm_up + count)][warm_up:]


def halve_until_it_fits(measure, batch_size):
    """measure(batch_size) -> dict, with the batch size halved for as long as memory does not suffice; it says so."""
    wanted = batch_size
    while True:
        try:
            result = measure(batch_size)
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
            batch_size //= 2
            torch.cuda.empty_cache()
        else:
            note = {} if batch_size == wanted else {"note": f"out of memory at {batch_size * 2} images"}
            return dict(batch_size=batch_size) | result | note


def time_step(given, contestant):
    """Images a second of a contestant, not compiled on a CPU: median of the steps after 5, peak memory, and a profile.

    triton: whether the kernels are on, which a contestant alone does not say: they may not work here.
    """
    on_gpu = given.device == "cuda"

    def measure(batch_size):
        name = contestant if on_gpu else contestant.removesuffix(" compiled")
        step = contestants.make_step(given.model, name, batch_size, given)
        for _ in range(5):
            step()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        times = times_ms(step, given.device, given.steps, warm_up=0)
        peak = round(torch.cuda.max_memory_allocated() / 2**20) if on_gpu else None
        median = statistics.median(times)
        report = dict(images_per_s=round(1e3 * batch_size / median, 1), median_ms=median, peak_mib=peak)
        report |= dict(fastest_ms=min(times), slowest_ms=max(times))
        report["triton"] = triton_switch.runs_in_triton(torch.empty(0, device=given.device))
        return report | profile(step, batch_size, given.device)

    return halve_until_it_fits(measure, given.batch_size)


def profile(step, batch_size, device):
    """Microseconds an image of a step: of each class of kernel, and of the longest ones with launches a step."""
    on_gpu = device == "cuda"
    steps = 3 if on_gpu else 1
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        for _ in range(steps):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    classes, rows = dict.fromkeys([*CLASSES, "other"], 0.0), []
    for event in profiler.key_averages():
        us = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / steps / batch_size
        classes[next((name for name, words in CLASSES.items() if re.search(words, event.key)), "other")] += us
        rows.append((round(us, 2), round(event.count / steps), event.key[:120]))
    return dict(profile={name: round(us, 2) for name, us in classes.items()}, longest=sorted(rows, reverse=True)[:15])


# ---- The checks


def machine(args):
    """Versions, clocks, compiler."""
    versions = {}
    for name in ("torch", "triton", "timm", "torchvision", "MinkowskiEngine"):
        with contextlib.suppress(ImportError):
            versions[name] = importlib.import_module(name).__version__
    report = dict(versions=versions, python=sys.version.split()[0], cores=len(os.sched_getaffinity(0)))
    report["missing_for_triton"] = triton_switch.what_is_missing()
    if not args.dry:
        properties = torch.cuda.get_device_properties(0)
        report |= dict(gpu=properties.name, multiprocessors=properties.multi_processor_count)
        report["memory_gib"] = round(properties.total_memory / 2**30, 1)
        fields = "clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu,driver_version"
        with contextlib.suppress(OSError):
            query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
            values = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()[0].split(", ")
            report |= dict(zip(fields.split(","), values, strict=False))
    return report


def ceilings(args):
    """A large copy, and large matrix products."""
    device, side = ("cpu", 256) if args.dry else ("cuda", 8192)
    report = {}
    for name, dtype in dict(bfloat16=torch.bfloat16, tf32=torch.float32, float32=torch.float32).items():
        torch.backends.cuda.matmul.allow_tf32 = name != "float32"
        a = torch.randn(side, side, device=device, dtype=dtype)
        b = torch.empty_like(a)
        ms = statistics.median(times_ms(functools.partial(torch.mm, a, a, out=b), device, 10, warm_up=2))
        report[f"{name}_tflops"] = round(2 * side**3 / 1e9 / ms, 2)
    ms = statistics.median(times_ms(lambda: b.copy_(a), device, 10, warm_up=2))
    return report | dict(copy_gb_per_s=round(2 * a.nbytes / 1e6 / ms, 1))


def kernels(args):
    """All Triton kernels of base, compiled side by side: seconds, and registers and spills of each."""
    from models import launch

    if args.dry:
        return dict(works=triton_switch.triton_works("cuda"))
    works = triton_switch.triton_works(torch.device("cuda"))
    triton_switch.use_triton(True)
    model, start = fcmae.convnextv2_base(norm_pix_loss=True).cuda(), time.perf_counter()
    variants = launch.find_variants(model, (2, 3, 224, 224), torch.bfloat16)
    launch.compile_variants(variants)
    report, rows = dict(works=works, seconds=round(time.perf_counter() - start, 1)), []
    for kernel, dtypes, sizes in variants.values():
        compiled = kernel.warmup(*dtypes, grid=(1,), **sizes)
        compiled._init_handles()
        constants = {name: value for name, value in sizes.items() if name.isupper()}
        rows.append(dict(kernel=kernel.__name__, registers=compiled.n_regs, spills=compiled.n_spills, **constants))
    return report | dict(variants=rows)


def kernels_are_right(args):
    """The largest error of each operator against its reference in float64, relative to the largest value."""
    from models import kernels, mlp_kernels

    device, report = "cpu" if args.dry else "cuda", {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for operator, inputs in kernels.calls(device, dtype) + mlp_kernels.calls(device, dtype):
            exact = [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs]
            pairs = zip(tree_leaves(operator(*inputs)), tree_leaves(operator._init_fn(*exact)), strict=True)
            gaps = [(x.double() - y).abs().max() / y.abs().max() for x, y in pairs if y.numel()]
            report.setdefault(f"{operator._name} {str(dtype).removeprefix('torch.')}", []).extend(gaps)
    return {name: torch.stack(gaps).max().item() for name, gaps in report.items()}  # nan, if one is


def equals_dense_masked(args):
    """A step of atto against the dense masked reference: float32 without TF32, and bfloat16 against its own error."""
    given = settings(args)
    report, exact = {}, None
    for dtype in ("float32", "bfloat16"):
        for name, contestant in dict(dense="dense masked", packed="packed").items():
            model = to_device(contestants.build_fcmae("convnextv2_atto", contestant, given.input_size), given.device)
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
            imgs, noise = draw_batch(model, given)
            with torch.autocast(given.device, torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = model(imgs, noise=noise)[0]
            loss.backward()
            gradient = torch.cat([p.grad.flatten().double() for p in model.parameters()])
            exact = gradient if exact is None else exact  # of the first
            report[f"{dtype}_error_of_{name}"] = ((gradient - exact).norm() / exact.norm()).item()
    as_good = report["bfloat16_error_of_packed"] < 2 * report["bfloat16_error_of_dense"] + 1e-3
    return report | dict(float32_equal=report["float32_error_of_packed"] < 1e-4, bfloat16_as_good=as_good)


def draw_batch(model, given):
    """Four images of noise, and the noise of their masks, the same each time."""
    generator = torch.Generator().manual_seed(1)
    imgs = torch.randn(4, 3, given.input_size, given.input_size, generator=generator).to(given.device)
    return imgs, torch.rand(4, model.num_patches(imgs), generator=generator).to(given.device)


def base_compiled(args):
    return time_step(settings(args), "packed compiled")


def base_eager(args):
    return time_step(settings(args), "packed")


def base_without_triton(args):
    return time_step(settings(args), "packed without triton")


def base_dense_masked(args):
    return time_step(settings(args), "dense masked")


def depthwise(args):
    """Microseconds an image of the depthwise convolution alone, forward and backward, by stage of base."""
    from models.depthwise import sparse_depthwise_conv
    from models.sites import active_sites

    given, report = settings(args), {}
    for stage, dim in enumerate((8, 8, 8, 8) if args.dry else (128, 256, 512, 1024)):
        k = 8 >> stage
        visible = torch.rand(given.batch_size, 49, device=given.device).argsort(1)[:, :19].sort().values
        sites = active_sites(visible, (7, 7), k)
        conv = to_device(torch.nn.Conv2d(dim, dim, 7, padding=3, groups=dim), given.device)
        dtype = getattr(torch, given.dtype)
        x = torch.randn(given.batch_size, 19 * k * k, dim, device=given.device, dtype=dtype, requires_grad=True)
        conv.to(dtype)

        def step(x=x, conv=conv, sites=sites):
            y, _ = sparse_depthwise_conv(x, conv, sites)
            y.backward(y)

        ms = statistics.median(times_ms(step, given.device, given.steps, warm_up=3))
        report[f"stage_{stage + 1}"] = round(1e3 * ms / given.batch_size, 3)
    return report


def batch_sweep(args):
    sizes = (64,) if args.dry else (64, 128, 512, 1024)
    return {str(size): time_step(settings(args, batch_size=size, steps=5), "packed compiled") for size in sizes}


def synchronizations(args):
    """What of an eager step waits for the device."""
    import warnings

    given = settings(args)
    step = contestants.make_step(given.model, "packed", given.batch_size, given)
    step()
    if not args.dry:
        torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step()
    return dict(found=sorted({str(w.message).splitlines()[0] for w in caught if "synchroniz" in str(w.message)}))


def resume(args):
    """Digits in bfloat16 and float16: finite, and the same bits after a SIGKILL at the first checkpoint?"""
    dtypes = ("bfloat16",) if args.dry else ("bfloat16", "float16")
    train = functools.partial(train_and_kill, settings(args).device)
    with ThreadPoolExecutor() as pool:
        return dict(zip(dtypes, pool.map(train, dtypes), strict=True))


def train_and_kill(device, dtype):
    """Two trainings of two epochs, one of them killed and resumed: are the weights finite, and the same bits?"""
    flags = "--data_set DIGITS --model convnextv2_atto --input_size 32 --stem_stride 1 --epochs 2 --warmup_epochs 1"
    flags += f" --decoder_embed_dim 64 --batch_size 128 --num_workers 0 --device {device} --use_amp --amp_dtype {dtype}"
    weights = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("whole", "killed"):
            output = Path(folder) / name
            run = [sys.executable, "main_pretrain.py", *flags.split(), "--output_dir", str(output)]
            if name == "killed":
                process = subprocess.Popen(run)
                while process.poll() is None and not (output / "checkpoint-0.pth").exists():
                    time.sleep(0.01)
                process.kill()
                process.wait()
            subprocess.run(run, check=True)
            weights.append(torch.load(output / "checkpoint-1.pth", weights_only=True)["model"])
    same = all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    return dict(finite=all(w.isfinite().all().item() for w in weights[0].values()), same_bits=same)


def finetuning(args):
    """Steps of fine-tuning beside timm's model, channels last."""
    given = settings(args, part="finetune", batch_size=128, steps=10)
    return {name: time_step(given, name) for name in ("dense compiled", "timm channels last compiled")}


def ddp(args):
    """One process and nccl: the gradients of a compiled step are those without DDP?"""
    given = settings(args)
    with tempfile.TemporaryDirectory() as folder:
        backend = "gloo" if args.dry else "nccl"
        torch.distributed.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
    model = to_device(fcmae.convnextv2_atto(img_size=given.input_size), given.device)
    imgs, noise = draw_batch(model, given)
    expected = torch.autograd.grad(model(imgs, noise=noise, masked_only=True)[0], list(model.parameters()))
    parallel = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    parallel = parallel if args.dry else torch.compile(parallel)
    parallel(imgs, noise=noise, masked_only=True)[0].backward()
    gaps = [(p.grad - g).norm() / (g.norm() + 1e-12) for p, g in zip(model.parameters(), expected, strict=True)]
    torch.distributed.destroy_process_group()
    return dict(largest_error=torch.stack(gaps).max().item())


def loader(args):
    """Images a second from JPEGs of 500 x 375 on all cores, pre-training and fine-tuning."""
    cores = 1 if args.dry else len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(cores) as pool:
        rates = list(pool.map(load_on_one_core, range(cores), [args.dry] * cores))
    return {name: round(sum(rate[name] for rate in rates), 1) for name in rates[0]}


def load_on_one_core(number, dry):
    from tools import loaders

    torch.set_num_threads(1)
    count, rates = (8, {}) if dry else (100, {})
    with tempfile.TemporaryDirectory() as folder:
        loaders.draw_jpegs(Path(folder) / "photographs", count, (60, 50) if dry else (500, 375))
        for training in ("pre-training", "fine-tuning"):
            steps = loaders.make_steps(training, Path(folder), 32 if dry else 224)
            times = times_ms(steps["this loader"], "cpu", 1 if dry else 5, warm_up=1)
            rates[training] = 1e3 * count / statistics.median(times)
    return rates


def minkowski(args):
    """MinkowskiEngine's step of atto in float32, if it is there."""
    given = settings(args, model="convnextv2_atto", dtype="float32", batch_size=64, steps=2)
    if reason := contestants.why_no_minkowski(given):
        return dict(left_out=reason)
    return {name: time_step(given, name) for name in ("packed", "minkowski")}


# Most valuable first. Checks of one line run side by side, and are not timed; each has so many seconds at most.
CHECKS = [
    {machine: 30}, {ceilings: 40}, {kernels: 150},
    {kernels_are_right: 180, equals_dense_masked: 180, synchronizations: 180, resume: 240, ddp: 180},
    {base_compiled: 200}, {base_eager: 60}, {base_dense_masked: 90}, {base_without_triton: 60}, {finetuning: 240},
    {depthwise: 60}, {loader: 120}, {batch_sweep: 300}, {minkowski: 60},
]  # fmt: skip
