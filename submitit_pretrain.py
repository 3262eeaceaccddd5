"""FCMAE pre-training on a Slurm cluster: gives main_pretrain.py to the scheduler, through submitit, and returns.

    python submitit_pretrain.py --nodes 4 --ngpus 8 --partition PARTITION @recipes/pretrain_imagenet.args \\
        --data_path IMAGENET

All flags of main_pretrain.py work. A job that is preempted or that runs out of time is queued again by itself, under
the same number, and goes on from the very step.
"""

import copy
import importlib
import os
import shlex
import sys
from pathlib import Path

import utils  # isort: skip  (before torch)
import submitit

import main_pretrain
from utils import UserError


def parse_args(script, description):
    """The flags of `script`, a training script as a module, and those of the cluster."""
    parser = utils.FlagParser(description=description.splitlines()[0], parents=[script.get_args_parser()])
    group = parser.add_argument_group("cluster", "The job's folder is --output_dir too, unless one is given.")
    group.add_argument("--ngpus", default=8, type=int, help="GPUs of a node, a process each; --device cpu: processes")
    group.add_argument("--nodes", default=2, type=int, help="machines")
    group.add_argument("--timeout", default=4320, type=int, help="minutes, then the job is queued again")
    group.add_argument("--job_dir", default="./jobs/%j", metavar="FOLDER", help="of the job; %%j becomes its number")
    group.add_argument("--partition", default=None, metavar="NAME", help="of Slurm; None: the cluster's default")
    group.add_argument("--use_volta32", action="store_true", help="the constraint volta32gb: GPUs of 32 GB")
    group.add_argument("--comment", default="", help="for the scheduler, which may ask for one")
    group.add_argument("--constraint", default=None, help="features that the nodes must have")
    group.add_argument("--account", default=None, help="to charge")
    group.add_argument("--qos", default=None, help="quality of service")
    group.add_argument("--mem_gb", default=None, type=float, help="GB of memory a node; None: 40 for each GPU")
    group.add_argument("--cpus_per_task", default=10, type=int, help="cores for each process and its loader workers")
    group.add_argument(
        "--cluster",
        default="slurm",
        choices=("slurm", "local", "debug"),
        help="local: in the background of this machine; debug: one process, in the foreground",
    )
    parser.set_defaults(device="cuda")  # the machine that submits may have none
    return parser.parse_args()


def check_args(script, args):
    """Raise UserError for what cannot work, before the job waits in the queue for it."""
    utils.check_least(args, 1, "ngpus nodes timeout cpus_per_task")
    if args.mem_gb is not None and args.mem_gb <= 0:
        raise UserError(f"--mem_gb {args.mem_gb}: must be above 0")
    if args.cluster != "slurm" and args.nodes > 1 or args.cluster == "debug" and args.ngpus > 1:
        what = "--nodes 1 --ngpus 1" if args.cluster == "debug" else "--nodes 1"
        raise UserError(f"--nodes {args.nodes} --ngpus {args.ngpus}: --cluster {args.cluster} takes {what} only")
    here = copy.deepcopy(args)
    if args.cluster == "slurm" and args.device.startswith("cuda"):
        here.device = "cpu"  # the GPUs are elsewhere
    script.check_args(here)


class Trainer:
    """The job, on each of its processes: `script.main(args)`, with its ranks and its folder filled in."""

    def __init__(self, script, args, attempt=0):
        self.script, self.args, self.attempt = script, args, attempt

    def __call__(self):
        job = submitit.JobEnvironment()
        args = in_folder_of_job(self.args, job.job_id)
        if args.cluster == "local" and self.attempt == 0 and utils.list_checkpoints(args.job_dir):
            raise RuntimeError(f"{args.job_dir}: an earlier job of this number left checkpoints; give an --output_dir")
        if args.dist_url == "env://":
            args.dist_url = f"file://{self.meeting_place(job)}"
        ranks = {"RANK": job.global_rank, "WORLD_SIZE": job.num_tasks, "LOCAL_RANK": job.local_rank}
        os.environ |= {name: str(rank) for name, rank in ranks.items()}
        utils.run_main(importlib.import_module(self.script).main, args, self.script)

    def meeting_place(self, job):
        """The file in which the processes find each other; no earlier start of this job or another has used it."""
        # the last two numbers: how often submitit queued the job again, and how often Slurm did
        starts = f"{self.attempt}-{os.environ.get('SLURM_RESTART_COUNT', 0)}"
        file = Path(in_folder_of_job(self.args, job.job_id).job_dir) / f"rendezvous-{job.job_id}-{starts}"
        if job.global_rank == 0:
            for earlier in file.parent.glob(f"rendezvous-{job.job_id}-*"):
                if earlier != file:
                    earlier.unlink(missing_ok=True)  # of processes that were killed
        return file

    def checkpoint(self):
        """What submitit puts into the queue after a signal: the same again, which goes on from what was saved."""
        return submitit.helpers.DelayedSubmission(Trainer(self.script, self.args, self.attempt + 1))


def in_folder_of_job(args, job_id):
    """The flags with the job's number for %j, and the job's folder for what has none."""
    args = copy.deepcopy(args)
    args.job_dir = args.job_dir.replace("%j", job_id)
    args.output_dir = args.output_dir.replace("%j", job_id) or args.job_dir
    args.log_dir = args.log_dir and args.log_dir.replace("%j", job_id)
    return args


def cluster_parameters(args):
    """What submitit is to ask the scheduler for; it leaves out what is None."""
    on_gpus = args.device.startswith("cuda")
    constraints = [args.constraint, "volta32gb" if args.use_volta32 else None]
    return {
        "nodes": args.nodes,
        "tasks_per_node": args.ngpus,
        "gpus_per_node": args.ngpus if on_gpus else None,
        "cpus_per_task": args.cpus_per_task,
        "mem_gb": 40 * args.ngpus if args.mem_gb is None and on_gpus else args.mem_gb,
        "timeout_min": args.timeout,
        "slurm_signal_delay_s": 120,  # before the end of that time, to save
        "slurm_partition": args.partition,
        "slurm_comment": args.comment or None,
        "slurm_constraint": "&".join(filter(None, constraints)) or None,
        "slurm_account": args.account,
        "slurm_qos": args.qos,
        "slurm_additional_parameters": {"requeue": True},
        # A process that dies takes the others with it. srun of some versions does not take over sbatch's cores.
        "slurm_srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={args.cpus_per_task}"],
        "slurm_setup": [f"export PYTHONPATH={shlex.quote(pythonpath())}"],
    }


def pythonpath():
    """For a job to import these files, from wherever it was submitted."""
    return os.pathsep.join(filter(None, [str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH")]))


def submit(script, args):
    """Give the job to the scheduler and say where it writes."""
    check_args(script, args)
    args.job_dir = os.path.abspath(args.job_dir)
    os.environ["PYTHONPATH"] = pythonpath()  # for --cluster local
    endless = {"slurm_max_num_timeout": 1000, "local_max_num_timeout": 1000}
    try:
        executor = submitit.AutoExecutor(args.job_dir, cluster=args.cluster, **endless)
        executor.update_parameters(name=script.__name__.replace("main_", "convnextv2_"), **cluster_parameters(args))
        job = executor.submit(Trainer(script.__name__, args))
    except (RuntimeError, OSError) as error:
        raise UserError(f"--cluster {args.cluster}: {' '.join(str(error).split())}") from None
    folders = in_folder_of_job(args, job.job_id)
    print(f"job {job.job_id}: logs in {folders.job_dir}, checkpoints and TensorBoard in {folders.output_dir}")
    if args.cluster == "debug":
        return job.result()
    print(f"  tail -f {job.paths.stdout}")


def main(script=main_pretrain, description=__doc__):
    utils.run_main(lambda args: submit(script, args), parse_args(script, description), Path(sys.argv[0]).name)


if __name__ == "__main__":
    main()
