"""List the images of a data set ahead of a job, and keep the index, so that the job starts at once.

python -m tools.index IMAGENET              # its train/ and val/, if it has them
python -m tools.index SHARDS --index_dir /shared/indexes
"""

import flags
import sources
from index import open_index
from utils import UserError, log


def get_args_parser():
    parser = flags.FlagParser(add_help=False)
    parser.add_argument("data_path", metavar="PATH", help="as --data_path of a training")
    sources.add_source_args(parser.add_argument)
    return parser


def main(args):
    done = set()
    for split in ("train", "val"):
        try:
            source = sources.find_source(args.data_path, split, False)
            if source in done or source.kind == "array":
                continue
            index = open_index(source, sources.options_of(args), keep=True)
        except (OSError, UserError) as error:
            if split == "val" and done:  # a source may have one split
                continue
            reason = ": no such folder, archive, list or table" if isinstance(error, OSError) else ""
            raise UserError(f"PATH: {error}{reason}") from None
        if not len(index):
            raise UserError(f"PATH {source}: no image there")
        done.add(source)
        kept = f"index in {index.folder}" if index.folder else "index not kept"
        log(f"{source}: {len(index):,} images, {len(index.class_names):,} classes; {kept}")
    if not done:
        log(f"{args.data_path}: arrays need no index")


if __name__ == "__main__":
    flags.run_script(main, get_args_parser(), __doc__)
