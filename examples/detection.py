"""Object detection: torchvision's Faster R-CNN, or Mask R-CNN, with FPN on the pre-trained encoder.

    pip install pycocotools
    python -m examples.scenes SCENES                                                    # or your own in COCO's format:
    python -m examples.detection --data_path SCENES --encoder output/checkpoint-9.pth --output_dir output/rcnn

    FOLDER/train/images/NAME.png    RGB, of any size
    FOLDER/train/annotations.json   COCO's instances: images, annotations, categories
    FOLDER/val/...

Without --encoder the encoder starts at random; --freeze leaves it as it is. Prints COCO's box AP on val/, and mask AP
with --masks.
"""

import contextlib
import io

import numpy as np
import torch
from torch import nn

import flags
from examples.common import Scales, add_training_args, build_encoder, read_image, train
from utils import UserError


def build_model(args, num_classes):
    """torchvision's detector with anchors from 16 pixels on, and narrow: for COCO 256 channels and a width of 1024."""
    from torchvision.models.detection import faster_rcnn, mask_rcnn, rpn
    from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

    encoder, channels, width = build_encoder(args), 64, 256
    backbone = nn.Sequential(Scales(encoder), FeaturePyramidNetwork(encoder.dims, channels, LastLevelMaxPool()))
    backbone.out_channels = channels  # of each of the five scales, for torchvision
    (mean, std), build, masks = encoder.statistics, faster_rcnn.FasterRCNN, {}
    if args.masks:
        build, masks["mask_head"] = mask_rcnn.MaskRCNN, mask_rcnn.MaskRCNNHeads(channels, (64, 64), 1)
        masks["mask_predictor"] = mask_rcnn.MaskRCNNPredictor(64, 64, num_classes)
    return build(
        backbone, min_size=args.input_size, max_size=2 * args.input_size,
        image_mean=mean, image_std=std,
        rpn_anchor_generator=rpn.AnchorGenerator(((16,), (32,), (64,), (128,), (256,)), ((0.5, 1.0, 2.0),) * 5),
        rpn_post_nms_top_n_train=200, rpn_post_nms_top_n_test=100, box_batch_size_per_image=64,
        box_head=faster_rcnn.TwoMLPHead(channels * 7**2, width),
        box_predictor=faster_rcnn.FastRCNNPredictor(width, num_classes), **masks,
    ).to(args.device)  # fmt: skip


class CocoFolder:
    """The images of a folder and the annotations of its annotations.json. Raises UserError if it cannot be read."""

    def __init__(self, folder, masks):
        try:
            from pycocotools.coco import COCO
        except ModuleNotFoundError:
            raise UserError("examples.detection: needs pycocotools: pip install pycocotools") from None
        self.folder, self.masks = folder, masks
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self.coco = COCO(f"{folder}/annotations.json")
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"--data_path: {folder}/annotations.json: {error}; give COCO's instances") from None
        self.ids = sorted(self.coco.imgs)
        self.categories = sorted(self.coco.cats)  # any numbers; the model's are 1, 2, ...

    def image(self, number):
        """(3, H, W) float in [0, 1]."""
        path = f"{self.folder}/images/{self.coco.imgs[self.ids[number]]['file_name']}"
        return torch.from_numpy(read_image(path, "RGB")).permute(2, 0, 1) / 255

    def target(self, number):
        """torchvision's target: boxes (n, 4) as x1, y1, x2, y2, labels (n,), masks (n, H, W) if asked for."""
        image = self.coco.imgs[self.ids[number]]
        found = [a for a in self.coco.imgToAnns[image["id"]] if not a.get("iscrowd") and min(a["bbox"][2:]) > 0]
        boxes = torch.tensor([a["bbox"] for a in found], dtype=torch.float32).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]  # from x, y, width, height
        labels = torch.tensor([1 + self.categories.index(a["category_id"]) for a in found], dtype=torch.long)
        target = {"boxes": boxes, "labels": labels}
        if self.masks:
            masks = np.array([self.coco.annToMask(a) for a in found], np.uint8)
            target["masks"] = torch.from_numpy(masks).view(len(found), image["height"], image["width"])
        return target


def average_precision(data, results, kind):
    """COCO's AP over IoU 0.50 to 0.95, in per cent. results: its list of detections; kind: bbox or segm."""
    from pycocotools.cocoeval import COCOeval

    if not results:
        return 0.0
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(data.coco, data.coco.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return 100 * float(evaluation.stats[0])


def detect(model, data, device):
    """COCO's list of detections of all images."""
    from pycocotools.mask import encode

    results = []
    for number, image_id in enumerate(data.ids):
        (output,) = model([data.image(number).to(device)])
        output["boxes"][:, 2:] -= output["boxes"][:, :2]  # to x, y, width, height
        boxes, labels, scores = (output[name].tolist() for name in ("boxes", "labels", "scores"))
        for i, (box, label, score) in enumerate(zip(boxes, labels, scores, strict=True)):
            results.append(dict(image_id=image_id, category_id=data.categories[label - 1], bbox=box, score=score))
            if data.masks:
                mask = output["masks"][i, 0].cpu().numpy() > 0.5
                results[-1]["segmentation"] = encode(np.asfortranarray(mask, np.uint8))
    return results


def get_args_parser():
    parser = flags.FlagParser(add_help=False)
    add_training_args(parser, epochs=20, lr=1e-3)
    add = parser.add_argument
    add("--input_size", default=128, type=flags.at_least(32), help="shorter side of images in the network, in pixels")
    add("--masks", default=False, action=flags.Switch, help="Mask R-CNN instead of Faster R-CNN")
    return parser


def main(args):
    flags.check_device(args)
    data, val = (CocoFolder(f"{args.data_path}/{split}", args.masks) for split in ("train", "val"))
    if data.categories != val.categories:
        raise UserError(f"--data_path: categories of val/ {val.categories}: must be those of train/ {data.categories}")
    model = build_model(args, 1 + len(data.categories))

    def compute_loss(indices):
        images = [data.image(number).to(args.device) for number in indices]
        targets = [{k: v.to(args.device) for k, v in data.target(number).items()} for number in indices]
        return sum(model(images, targets).values())

    def evaluate():
        results = detect(model, val, args.device)
        return {kind: average_precision(val, results, kind) for kind in (("bbox", "segm") if args.masks else ("bbox",))}

    precisions = train(args, model, len(data.ids), compute_loss, evaluate)
    text = "  ".join(f"{kind} AP {value:.2f} %" for kind, value in precisions.items())
    print(f"{text}  ({len(data.ids)} images to train, {len(val.ids)} to validate, {len(data.categories)} categories)")
    return precisions


if __name__ == "__main__":
    flags.run_script(main, get_args_parser(), __doc__)
