"""Write the bare weights of a checkpoint under the original's or timm's names.

python -m tools.convert OUTPUT/checkpoint-best.pth convnextv2_tiny.pth --to timm
"""

from pathlib import Path

import utils
from models.checkpoints import get_weights, network_config, split_decoder, to_timm
from utils import UserError


def get_args_parser():
    parser = utils.FlagParser(add_help=False)
    parser.add_argument("input", metavar="IN", help="checkpoint of this project, of the original or of timm")
    parser.add_argument("output", metavar="OUT", help="file to write")
    parser.add_argument(
        "--to",
        required=True,
        choices=("original", "timm"),
        help="original: the dense names under 'model'; timm: what timm.create_model(NAME, checkpoint_path=OUT) loads",
    )
    parser.add_argument(
        "--model_key", default="model|module", help="where the weights are; model_ema: the averaged ones"
    )
    return parser


def main(args):
    checkpoint = utils.load_checkpoint(args.input)
    if Path(args.output).resolve() == Path(args.input).resolve():
        raise UserError(f"OUT {args.output}: is the same file as IN")
    state, decoder = split_decoder(get_weights(checkpoint, args.input, args.model_key))
    try:
        config = network_config(state)
    except ValueError as error:
        raise UserError(f"{args.input}: {error}: accepted is a ConvNeXt V2") from None
    state = to_timm(state) if args.to == "timm" else state
    try:
        utils.save_whole(args.output, state if args.to == "timm" else {"model": state})
    except OSError as error:
        raise UserError(f"OUT {error}") from None
    has_head = "head.weight" in state or "head.fc.weight" in state
    head = "a head" if has_head else "no head (timm: num_classes=0)"
    size = f"depths {config['depths']}, dims {config['dims']}"
    print(f"{len(state)} tensors, {size}, {head}, {len(decoder)} of a decoder left out: {args.output}")


if __name__ == "__main__":
    utils.run_script(main, utils.FlagParser(description=__doc__.splitlines()[0], parents=[get_args_parser()]))
