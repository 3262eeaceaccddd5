"""Draw images and the eight nearest to each by the cosine of their features: what a representation calls alike.

python -m tools.neighbours --checkpoint OUTPUT/checkpoint-799.pth FOLDER --output neighbours.png
python -m tools.neighbours --checkpoint OUTPUT/checkpoint-799.pth FOLDER --queries A.jpg B.jpg --output neighbours.png

A feature is the mean over all sites of a stage's map. Captions: cosine, folder / file. If folders are classes, a green
frame means the query's class and a red one another.
"""

from pathlib import Path

import torch
import torch.nn.functional as F

import flags
from evaluation import pool_features
from tools.common import check_output
from tools.inference import add_inference_args, load_inference
from tools.sheet import check_picture, read_pixels, save_sheet
from utils import UserError, log

NEAREST = 8


def get_args_parser():
    parser = flags.FlagParser(add_help=False)
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="image files, or folders of them, to find neighbours among")
    add("--queries", nargs="+", metavar="IMAGE", help="images to find the neighbours of; None: some of the images")
    add("--num_queries", default=8, type=flags.at_least(1), help="how many of the images, evenly spread")
    add("--scale", default=4, type=int, choices=(1, 2, 3, 4), help="stage of the features, 4 the last")
    add("--output", default="neighbours.png", metavar="FILE", help="picture to write")
    add_inference_args(parser)
    return parser


def compute_features(inference, dataset, scale):
    """Unit features (n, C) of the images that can be read, and their indices (n,). Raises UserError for none."""
    indices, features, errors = [], [], []
    for batch, rows, unreadable in inference.compute(
        lambda imgs: pool_features(inference.model.feature_maps(imgs)[scale - 1]), dataset, range(len(dataset))
    ):
        errors += unreadable
        if rows is not None:
            indices.append(batch)
            features.append(F.normalize(rows, dim=1))
    for index, error in errors:
        log(f"unreadable, left out: {dataset.images.name(index)}: {error}")
    if not features:
        raise UserError(f"none of the {len(dataset)} images can be read")
    return torch.cat(features), torch.cat(indices)


def draw_row(query, gallery, cosines, own_class):
    """A query's row of a sheet. query: (dataset, index); gallery: (dataset, indices of the nearest)."""
    (dataset, index), (images, nearest) = query, gallery
    folder, cells = Path(dataset.images.name(index)).parent, []
    cells.append((read_pixels(dataset, index), f"query\n{label(dataset, index)}", "black"))
    for number, cosine in zip(nearest.tolist(), cosines.tolist(), strict=True):
        same = Path(images.images.name(number)).parent.name == folder.name
        color = ("green" if same else "red") if own_class else None
        cells.append((read_pixels(images, number), f"{cosine:.3f}\n{label(images, number)}", color))
    return cells


def label(dataset, index):
    path = Path(dataset.images.name(index))
    return f"{path.parent.name}/{path.stem}"


def main(args):
    check_picture("--output", args.output)
    check_output(args.output, [*args.images, *(args.queries or [])])
    inference = load_inference(args)
    gallery = inference.build_dataset("IMAGE", args.images)
    features, indices = compute_features(inference, gallery, args.scale)
    if args.queries:
        queries = inference.build_dataset("--queries", args.queries)
        query_features, query_indices = compute_features(inference, queries, args.scale)
    else:
        count = min(args.num_queries, len(features))
        chosen = torch.arange(count) * len(features) // count
        queries, query_features, query_indices = gallery, features[chosen], indices[chosen]

    names = {Path(gallery.images.name(index)).parent for index in indices.tolist()}
    rows = []
    for feature, index in zip(query_features, query_indices.tolist(), strict=True):
        cosines = features @ feature
        own = [i for i, j in enumerate(indices.tolist()) if gallery.images.name(j) == queries.images.name(index)]
        cosines[own] = -torch.inf  # not its own neighbour
        top = cosines.topk(min(NEAREST, len(cosines) - len(own)))
        rows.append(draw_row((queries, index), (gallery, indices[top.indices]), top.values, len(names) > 1))
    save_sheet("--output", args.output, rows)
    log(f"{len(rows)} queries among {len(features)} images: {args.output}")


if __name__ == "__main__":
    flags.run_script(main, get_args_parser(), __doc__)
