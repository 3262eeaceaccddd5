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
from image_sets import spread
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
    parts = []
    for indices, rows, errors in inference.compute(
        lambda imgs: pool_features(inference.model.feature_maps(imgs)[scale - 1]), dataset, range(len(dataset))
    ):
        for index, error in errors:
            log(f"unreadable, left out: {dataset.images.name(index)}: {error}")
        if len(rows):
            parts.append((F.normalize(rows, dim=1), indices))
    if not parts:
        raise UserError(f"none of the {len(dataset)} images can be read")
    return map(torch.cat, zip(*parts, strict=True))


def draw_cell(dataset, index, caption, color):
    path = Path(dataset.images.name(index))
    return read_pixels(dataset, index), f"{caption}\n{path.parent.name}/{path.stem}", color


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
        chosen = spread(range(len(features)), args.num_queries)
        queries, query_features, query_indices = gallery, features[chosen], indices[chosen]

    paths = [Path(gallery.images.name(index)) for index in indices.tolist()]
    are_classes = len({path.parent for path in paths}) > 1  # the folders
    rows = []
    for feature, index in zip(query_features, query_indices.tolist(), strict=True):
        query, cosines = Path(queries.images.name(index)), features @ feature
        others = torch.tensor([path != query for path in paths])  # it is not its own neighbour
        top = cosines.where(others, -torch.inf).topk(min(NEAREST, int(others.sum())))
        row = [draw_cell(queries, index, "query", "black")]
        for cosine, i in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            color = "green" if paths[i].parent.name == query.parent.name else "red"
            row.append(draw_cell(gallery, indices[i].item(), f"{cosine:.3f}", color if are_classes else None))
        rows.append(row)
    save_sheet("--output", args.output, rows)
    log(f"{len(rows)} queries among {len(features)} images: {args.output}")


if __name__ == "__main__":
    flags.run_script(main, get_args_parser(), __doc__)
