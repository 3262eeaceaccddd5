"""The whole truth about one GPU, in ten minutes, as JSON and a table; needs torch, and little else.

    python -m tools.gpu_report --output report           # most valuable first, until --budget seconds are spent
    python -m tools.gpu_report --output report --dry     # the same in small on a CPU, whose times mean nothing

Each check is a process of its own with a time limit: one that raises, hangs or dies is reported as such, and the
others go on. Those that are not timed run side by side. FOLDER/report.json is rewritten, whole, after each;
FOLDER/report.md is its table; NAME.log holds what a check printed.
"""

import contextlib
import importlib
import json
import multiprocessing.connection
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

import flags
from checkpoints import write_text
from flags import Switch, at_least
from tools.gpu_checks import CHECKS
from utils import UserError, configure_cuda

# Counted for base at 224, batch of 256, bfloat16 (see `tools.gpu_counts` and BENCHMARKS.md), an image
GFLOP = 36.1  # matrix products
MEGABYTES = 174  # of all other kernels under --compile
EAGER_MEGABYTES = dict(gemm=124, depthwise=29, mlp=108, other=95)  # by the classes of `profile`
GOAL = 4000  # images a second of base


def run_here(check, args, path):
    """In a process of its own: the check's result, or its error, to a file; what it prints to a log."""
    os.setsid()  # so that whatever it starts can be ended with it
    sys.stdout = sys.stderr = open(path.with_suffix(".log"), "w", buffering=1)
    for number in (1, 2):  # what it starts writes there too
        os.dup2(sys.stdout.fileno(), number)
    if args.dry:
        torch.set_num_threads(1)
    else:
        configure_cuda()
    try:
        outcome = dict(status="ok", result=check(args))
    except Exception as error:
        traceback.print_exc()
        outcome = dict(status="failed", error=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    path.write_text(json.dumps(outcome))


def run_checks(checks, args, limit):
    """Run checks, {check: seconds at most}, side by side; yield (name, outcome) of each as it ends.

    An outcome has a status (ok, failed, killed or timeout), a result or an error, and seconds.
    """
    start, running = time.perf_counter(), {}
    # Where there is no CUDA yet to be disturbed a fork saves importing all again
    context = multiprocessing.get_context("fork" if args.dry else "spawn")
    for check in checks:
        path = Path(args.output) / f"{check.__name__}.part"
        running[check] = context.Process(target=run_here, args=(check, args, path)), path
        running[check][0].start()
    while running:
        multiprocessing.connection.wait([process.sentinel for process, _ in running.values()], timeout=0.1)
        seconds = time.perf_counter() - start
        for check, (process, path) in list(running.items()):
            allowed = min(checks[check], limit)
            if not process.is_alive() or seconds > allowed:
                del running[check]
                yield check.__name__, end_check(process, path, allowed) | dict(seconds=round(seconds, 1))


def end_check(process, path, allowed):
    """The outcome of a check but for its seconds; one that runs is ended."""
    if process.is_alive():
        outcome = dict(status="timeout", error=f"not done after {allowed:.0f} s")
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
    elif path.exists():
        outcome = json.loads(path.read_text())
    else:
        outcome = dict(status="killed", error=f"its process ended with status {process.exitcode}")
    process.join()
    path.unlink(missing_ok=True)
    return outcome


def leave_out(checks):
    """As `run_checks`, but none is run."""
    return [(check.__name__, dict(status="left out", error="the budget was spent", seconds=0)) for check in checks]


def write_report(report, folder):
    """FOLDER/report.json and report.md, each whole at any moment."""
    write_text(folder / "report.json", json.dumps(report, indent=1) + "\n")
    write_text(folder / "report.md", as_table(report))


def as_table(report):
    lines = ["# GPU report" + (" (dry: a CPU in small, times mean nothing)" if report["dry"] else ""), ""]
    lines += [f"* {verdict}" for verdict in report["verdicts"]]
    lines += ["", "| check | status | s | result |", "| - | - | - | - |"]
    for name, outcome in report["checks"].items():
        text = outcome.get("error") or json.dumps(outcome.get("result", "")).replace("|", "/")
        lines.append(f"| {name} | {outcome['status']} | {outcome['seconds']} | {text} |")
    return "\n".join(lines) + "\n"


def draw_verdicts(checks, dry):
    """What the results mean, in lines; only of checks that gave one."""
    results = {name: outcome["result"] for name, outcome in checks.items() if outcome["status"] == "ok"}
    lines = [f"{name}: {o['status']}, {o.get('error', '')}" for name, o in checks.items() if o["status"] != "ok"]
    speed = {name.removeprefix("base_"): r["images_per_s"] for name, r in results.items() if name.startswith("base_")}
    if dry:
        speed = {}  # of a CPU
    if "compiled" in speed:
        lines.append(f"{GOAL:,} img/s: {'yes' if speed['compiled'] >= GOAL else 'no'}, {speed['compiled']:,.0f}")
    if "compiled" in speed and "ceilings" in results:
        tops = results["ceilings"]
        bound = MEGABYTES * 1e3 / tops["copy_gb_per_s"] + GFLOP * 1e3 / tops["bfloat16_tflops"]
        lines.append(f"gap to bound {1e6 / speed['compiled'] / bound:.2f} ({1e6 / bound:,.0f} img/s)")
    if not dry and (off := results.get("kernels", {}).get("works")):
        lines.append(f"TRITON KERNELS ARE OFF: {off}")
    if "eager" in speed and "ceilings" in results:
        found = results["base_eager"]["profile"]
        bounds = {kind: size * 1e3 / results["ceilings"]["copy_gb_per_s"] for kind, size in EAGER_MEGABYTES.items()}
        bounds["gemm"] = max(bounds["gemm"], GFLOP * 1e3 / results["ceilings"]["bfloat16_tflops"])
        kind = max(bounds, key=lambda kind: found[kind] - bounds[kind])
        lines.append(f"largest excess, eager: {kind} {found[kind]:.0f} us an image for {bounds[kind]:.0f}")
    if "dense_masked" in speed and "compiled" in speed:
        lines.append(f"{speed['compiled'] / speed['dense_masked']:.2f} times the speed of dense masked")
    if "equals_dense_masked" in results:
        r = results["equals_dense_masked"]
        lines.append(f"equals dense masked: float32 {r['float32_equal']}, bfloat16 {r['bfloat16_as_good']}")
    for dtype, r in results.get("resume", {}).items():
        lines.append(f"killed and resumed in {dtype}: {'the same bits' if r['same_bits'] else 'OTHER BITS'}")
    return lines


def get_args_parser():
    parser = flags.FlagParser(add_help=False)
    add = parser.add_argument_group("what to report").add_argument
    add("--output", required=True, metavar="FOLDER", help="where to write report.json, report.md and logs")
    add("--budget", default=540, type=at_least(1), help="seconds for all checks; what does not fit is left out")
    add("--dry", default=False, action=Switch, help="in small on the CPU, to see that everything runs")
    add("--only", nargs="+", metavar="NAME", help="checks to run; None: all")
    return parser


def main(args):
    names = [check.__name__ for group in CHECKS for check in group]
    if args.only and not set(args.only) <= set(names):
        raise UserError(f"--only {' '.join(args.only)}: must be among {', '.join(names)}")
    if not args.dry and not torch.cuda.device_count():
        raise UserError("no CUDA GPU is visible; --dry runs the checks in small on the CPU")
    if args.dry:
        for name in ("timm", "torch._dynamo"):  # here once: else each check, a fork, would import them
            importlib.import_module(name)
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    report, start = dict(dry=args.dry, budget=args.budget, verdicts=[], checks={}), time.perf_counter()
    write_report(report, folder)
    for group in CHECKS:
        wanted = {check: limit for check, limit in group.items() if not args.only or check.__name__ in args.only}
        left = args.budget - (time.perf_counter() - start)
        outcomes = run_checks(wanted, args, left) if left >= 5 else leave_out(wanted)
        for name, outcome in outcomes:
            report["checks"][name] = outcome
            report["verdicts"] = draw_verdicts(report["checks"], args.dry)
            write_report(report, folder)
            print(f"{name}: {outcome['status']}, {outcome['seconds']} s", flush=True)
    print(*report["verdicts"], f"{folder / 'report.json'} has all of it", sep="\n")


if __name__ == "__main__":
    flags.run_script(main, get_args_parser(), __doc__)
