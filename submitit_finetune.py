"""Fine-tuning on a Slurm cluster: submits main_finetune.py through submitit, and returns.

    python submitit_finetune.py --nodes 1 --ngpus 8 --partition PARTITION @recipes/finetune_base.args \\
        --data_path IMAGENET --finetune CHECKPOINT

All flags of main_finetune.py work; the rest is as in submitit_pretrain.py.
"""

import main_finetune
import submitit_pretrain
from submitit_pretrain import Trainer, parse_args  # noqa: F401  (the same for both)


def main():
    submitit_pretrain.main(main_finetune, __doc__)


if __name__ == "__main__":
    main()
