"""Write the weights of a checkpoint in the form that another program loads.

    python -m tools.convert OUTPUT/checkpoint-best.pth convnextv2_tiny.pth --to timm
    python -m tools.convert OUTPUT/checkpoint-799.pth encoder.onnx --to onnx

    original       torch.save of {"model": dense names}, as the original's files; without a decoder
    timm           timm.create_model(NAME, num_classes=N, checkpoint_path=OUT)
    timm_features  timm.create_model(NAME, features_only=True, checkpoint_path=OUT)
    smp            segmentation_models_pytorch.Unet("tu-NAME").encoder.load_state_dict(torch.load(OUT))
    hf             a folder: transformers.ConvNextV2ForImageClassification.from_pretrained(OUT); without a head
                   ConvNextV2Model
    safetensors    convnextv2.from_checkpoint(OUT), and every script and tool here
    onnx           onnxruntime: normalized images of any number and size -> logits; without a head the four scales

What OUT does not say itself (image size, mean and standard deviation, names of classes) is written too where the form
has a place for it: hf, safetensors, onnx.
"""

import json
import logging
from functools import partial
from pathlib import Path

import torch

import flags
import utils
from checkpoints import load_checkpoint, save_together, write_text, write_whole
from models import convnextv2, files, weights
from tools.common import add_model_key_arg
from utils import UserError


def get_args_parser():
    parser = flags.FlagParser(add_help=False)
    add = parser.add_argument
    add("input", metavar="IN", help="any file of weights: of this project, the original, timm, transformers; timm:NAME")
    add("output", metavar="OUT", help="file to write; --to hf: folder")
    add("--to", required=True, choices=tuple(WRITERS), help="what is to load OUT: see README")
    add_model_key_arg(add)
    return parser


def write_torch(convert, output, state, checkpoint):
    """torch.save of convert(state, config)."""
    converted = convert(state, checkpoint.get("config"))
    save_together({output: converted})
    return converted.get("model", converted)


def write_safetensors(output, state, checkpoint):
    write_whole(output, lambda file: files.write_safetensors(checkpoint, state, file))
    return state


# Of transformers, by the kind of a task
PROBLEM_TYPES = {"multi-label classification": "multi_label_classification", "regression": "regression"}


def write_huggingface(output, state, checkpoint):
    """A folder of config.json, preprocessor_config.json and model.safetensors."""
    converted, network = weights.to_hf(state, checkpoint.get("config")), weights.network_config(state)
    seen = files.preprocessing(checkpoint, network["in_chans"])
    height, width = seen["input_size"][1:]
    kind = "ForImageClassification" if "head.weight" in state else "Model"
    config = dict(
        model_type="convnextv2", architectures=[f"ConvNextV2{kind}"], image_size=height, layer_norm_eps=1e-6,
        num_channels=network["in_chans"], patch_size=network["stem_stride"], depths=network["depths"],
        hidden_sizes=network["dims"], num_stages=4,
    )  # fmt: skip
    if "head.weight" in state:
        names = checkpoint.get("class_names") or [f"class {i}" for i in range(len(state["head.weight"]))]
        config |= dict(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})
        task = checkpoint.get("task") or {"kind": "classification"}
        config |= dict(problem_type=PROBLEM_TYPES.get(task["kind"]), convnextv2_task=task)
    preprocessor = dict(
        image_processor_type="ConvNextImageProcessor", size={"shortest_edge": min(height, width)}, resample=3,
        crop_pct=seen["crop_pct"], image_mean=seen["mean"], image_std=seen["std"],
    )  # fmt: skip
    Path(output).mkdir(exist_ok=True)
    for name, content in (("config", config), ("preprocessor_config", preprocessor)):
        write_text(Path(output) / f"{name}.json", json.dumps(content, indent=2) + "\n")
    return write_safetensors(Path(output) / "model.safetensors", converted, {})


def write_onnx(output, state, checkpoint):
    """A model of free batch, height and width, with `files.preprocessing` and the names of classes as metadata."""
    gigabytes = 4 * sum(value.numel() for value in state.values()) / 1e9
    if gigabytes > 2:
        raise ValueError(f"{gigabytes:.1f} GB of weights: a file of ONNX holds 2; take a smaller network")
    model, _ = convnextv2.from_checkpoint({"model": state, "config": checkpoint.get("config")})
    has_head, stride = "head.weight" in state, 8 * model.config["stem_stride"]
    names = ["logits"] if has_head else [f"scale{i}" for i in range(1, 5)]
    if not has_head:
        model.forward = model.feature_maps
    imgs = torch.zeros(2, model.config["in_chans"], 3 * stride, 2 * stride)  # sides that differ, and are not free of 1
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    options = dict(output_names=names, dynamic_shapes=({0: "batch", 2: "height", 3: "width"},), dynamo=True)
    try:
        exported = torch.onnx.export(model.eval(), (imgs,), input_names=["imgs"], verbose=False, **options).model_proto
    except ImportError as error:
        raise UserError(f"--to onnx: {error}: pip install onnx onnxscript") from None
    seen = files.preprocessing(checkpoint, model.config["in_chans"])
    for name, value in (seen | {name: checkpoint.get(name) for name in ("class_names", "task")}).items():
        exported.metadata_props.add(key=name, value=json.dumps(value))
    write_whole(output, lambda file: file.write(exported.SerializeToString()))
    return state


WRITERS = {  # by --to: write(output, dense state, checkpoint) returns the tensors written
    "original": partial(write_torch, lambda state, config: {"model": state}),
    "timm": partial(write_torch, weights.to_timm),
    "timm_features": partial(write_torch, weights.to_timm_features),
    "smp": partial(write_torch, partial(weights.to_timm_features, prefix="model.")),
    "hf": write_huggingface,
    "safetensors": write_safetensors,
    "onnx": write_onnx,
}


def main(args):
    checkpoint = load_checkpoint(args.input)
    if Path(args.output).exists() and Path(args.output).resolve() == Path(args.input).resolve():
        raise UserError(f"OUT {args.output}: is the same file as IN; choose another name")
    with utils.name_in_errors(args.input):
        state, decoder = weights.split_decoder(weights.find_weights(checkpoint, args.model_key))
        convnextv2.from_checkpoint(checkpoint, args.model_key)  # every key has its place
        sizes = weights.network_config(state)
    try:
        with utils.name_in_errors(f"{args.input} --to {args.to}"):
            written = WRITERS[args.to](args.output, state, checkpoint)
    except OSError as error:
        named = str(error) if str(args.output) in str(error) else f"{args.output}: {error.strerror or error}"
        raise UserError(f"OUT {named}") from None
    head = "a head" if "head.weight" in state else "no head (timm: num_classes=0)"
    size = f"depths {sizes['depths']}, dims {sizes['dims']}"
    print(f"{len(written)} tensors, {size}, {head}, {len(decoder)} of a decoder left out: {args.output}")


if __name__ == "__main__":
    flags.run_script(main, get_args_parser(), __doc__)
