"""FCMAE pre-training on a Slurm cluster: submits main_pretrain.py through submitit, and returns.

    python submitit_pretrain.py --nodes 4 --ngpus 8 --partition PARTITION @recipes/pretrain_imagenet.args \\
        --data_path IMAGENET

All flags of main_pretrain.py work. A job that is preempted or that runs out of time is requeued under the same number,
and resumes from the very step.
"""

import importlib
import os
import shlex
import sys
from pathlib import Path

import flags

import utils  # isort: skip  (before torch)
import checkpoints
import main_pretrain
from flags import Switch, above_0, at_least
from utils import UserError


def parse_args(script, description):
    """The flags of `script`, a training script as a module, and those of the cluster."""
    parser = flags.FlagParser(description=description.splitlines()[0], parents=[script.get_args_parser()])
    group = parser.add_argument_group("cluster", "The job's folder is --output_dir too, unless one is given.")
    add = group.add_argument
    add("--ngpus", default=8, type=at_least(1), help="GPUs per node, one rank each; with --device cpu: ranks")
    add("--nodes", default=2, type=at_least(1), help="number of nodes")
    add("--timeout", default=4320, type=at_least(1), help="minutes after which the job is requeued")
    add("--job_dir", default="./jobs/%j", metavar="FOLDER", help="job folder; %%j is the job's number")
    add("--partition", metavar="NAME", help="of Slurm; None: the cluster's default")
    add("--use_volta32", default=False, action=Switch, help="constraint volta32gb: GPUs of 32 GB")
    add("--comment", default="", help="comment for the scheduler")
    add("--constraint", help="features that the nodes must have")
    add("--account", help="account to charge")
    add("--qos", help="quality of service")
    add("--mem_gb", type=above_0, help="GB of memory per node; None: 40 for each GPU")
    add("--cpus_per_task", default=10, type=at_least(1), help="cores per rank, its loader workers' included")
    clusters = ("slurm", "local", "debug")
    where = "local: in the background of this machine; debug: one process, in the foreground"
    add("--cluster", default="slurm", choices=clusters, help=where)
    parser.set_defaults(device="cuda")  # the machine that submits may have none
    args = parser.parse_args()
    here = {"debug": {"nodes": 1, "ngpus": 1}, "local": {"nodes": 1}}.get(args.cluster, {})
    return args.replace(**{name: value for name, value in here.items() if name not in args.given})


def check_args(script, args):
    """Raise UserError for what cannot work, before the job waits in the queue for it."""
    if args.cluster != "slurm" and args.nodes > 1 or args.cluster == "debug" and args.ngpus > 1:
        accepted = "--nodes 1 --ngpus 1" if args.cluster == "debug" else "--nodes 1"
        raise UserError(f"--nodes {args.nodes} --ngpus {args.ngpus}: --cluster {args.cluster} takes {accepted} only")
    elsewhere = args.cluster == "slurm" and args.device.startswith("cuda")
    script.check_args(args.replace(device="cpu") if elsewhere else args)


class Trainer:
    """The job, on each of its ranks: `script.main(args)` in the job's folder."""

    def __init__(self, script, args, attempt=0):
        self.script, self.args, self.attempt = script, args, attempt

    def __call__(self):
        import submitit

        job = submitit.JobEnvironment()
        args = resolve_folders(self.args, job.job_id)
        if args.cluster == "local" and self.attempt == 0 and checkpoints.list_checkpoints(args.job_dir):
            raise RuntimeError(f"{args.job_dir}: an earlier job of this number left checkpoints; give an --output_dir")
        if args.dist_url == "env://":
            args = args.replace(dist_url=f"file://{self.rendezvous_file(job)}")
        ranks = {"RANK": job.global_rank, "WORLD_SIZE": job.num_tasks, "LOCAL_RANK": job.local_rank}
        os.environ |= {name: str(rank) for name, rank in ranks.items()}
        utils.run_main(importlib.import_module(self.script).main, args, self.script)

    def rendezvous_file(self, job):
        """The file through which the ranks find each other; no earlier start of this job or another has used it."""
        # the last two numbers: how often submitit requeued the job, and how often Slurm did
        starts = f"{self.attempt}-{os.environ.get('SLURM_RESTART_COUNT', 0)}"
        file = Path(resolve_folders(self.args, job.job_id).job_dir) / f"rendezvous-{job.job_id}-{starts}"
        if job.global_rank == 0:
            for earlier in file.parent.glob(f"rendezvous-{job.job_id}-*"):
                if earlier != file:
                    earlier.unlink(missing_ok=True)  # of ranks that were killed
        return file

    def checkpoint(self):
        """What submitit requeues after a signal: the same job, which resumes from what was saved."""
        import submitit

        return submitit.helpers.DelayedSubmission(Trainer(self.script, self.args, self.attempt + 1))


def resolve_folders(args, job_id):
    """The flags with the job's number for %j, and the job's folder where no --output_dir is given."""
    job_dir = args.job_dir.replace("%j", job_id)
    output_dir = args.output_dir.replace("%j", job_id) or job_dir
    log_dir = args.log_dir and args.log_dir.replace("%j", job_id)
    return args.replace(job_dir=job_dir, output_dir=output_dir, log_dir=log_dir)


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
        "slurm_signal_delay_s": 120,  # before the time is up, to save
        "slurm_partition": args.partition,
        "slurm_comment": args.comment or None,
        "slurm_constraint": "&".join(filter(None, constraints)) or None,
        "slurm_account": args.account,
        "slurm_qos": args.qos,
        "slurm_additional_parameters": {"requeue": True},
        # A rank that dies takes the others with it. srun of some versions does not inherit sbatch's cores.
        "slurm_srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={args.cpus_per_task}"],
        "slurm_setup": [f"export PYTHONPATH={shlex.quote(pythonpath())}"],
    }


def pythonpath():
    """For a job to import these files, from wherever it was submitted."""
    return os.pathsep.join(filter(None, [str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH")]))


def submit(script, args):
    """Submit the job and report where it writes."""
    import submitit

    check_args(script, args)
    args = args.replace(job_dir=os.path.abspath(args.job_dir))
    os.environ["PYTHONPATH"] = pythonpath()  # for --cluster local
    endless = {"slurm_max_num_timeout": 1000, "local_max_num_timeout": 1000}
    try:
        executor = submitit.AutoExecutor(args.job_dir, cluster=args.cluster, **endless)
        executor.update_parameters(name=script.__name__.replace("main_", "convnextv2_"), **cluster_parameters(args))
        job = executor.submit(Trainer(script.__name__, args))
    except (RuntimeError, OSError) as error:
        raise UserError(f"--cluster {args.cluster}: {' '.join(str(error).split())}") from None
    folders = resolve_folders(args, job.job_id)
    print(f"job {job.job_id}: logs in {folders.job_dir}, checkpoints and TensorBoard in {folders.output_dir}")
    if args.cluster == "debug":
        return job.result()
    print(f"  tail -f {job.paths.stdout}")


def main(script=main_pretrain, description=__doc__):
    utils.run_main(lambda args: submit(script, args), parse_args(script, description), Path(sys.argv[0]).name)


if __name__ == "__main__":
    main()
