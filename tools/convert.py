"""Write the bare weights of a checkpoint under the original's or timm's names.

python -m tools.convert OUTPUT/checkpoint-best.pth convnextv2_tiny.pth --to timm
"""

from pathlib import Path

import flags
import utils
from checkpoints import load_checkpoint, save_together
from models import weights
from tools.common import add_model_key_arg
from utils import UserError


def get_args_parser():
    parser = flags.FlagParser(add_help=False)
    add = parser.add_argument
    add("input", metavar="IN", help="checkpoint of this project, of the original or of timm")
    add("output", metavar="OUT", help="file to write")
    forms = "original: the dense names under 'model'; timm: what timm.create_model(NAME, checkpoint_path=OUT) loads"
    add("--to", required=True, choices=("original", "timm"), help=forms)
    add_model_key_arg(add)
    return parser


def main(args):
    checkpoint = load_checkpoint(args.input)
    if Path(args.output).resolve() == Path(args.input).resolve():
        raise UserError(f"OUT {args.output}: is the same file as IN; choose another name")
    with utils.name_in_errors(args.input):
        state, decoder = weights.split_decoder(weights.find_weights(checkpoint, args.model_key))
    try:
        sizes = weights.network_config(state)
    except ValueError as error:
        raise UserError(f"{args.input}: {error}: must be the weights of a ConvNeXt V2") from None
    with utils.name_in_errors(f"{args.input} --to timm"):
        converted = weights.to_timm(state, checkpoint.get("config")) if args.to == "timm" else {"model": state}
    try:
        save_together({args.output: converted})
    except OSError as error:
        raise UserError(f"OUT {error}") from None
    tensors = len(converted if args.to == "timm" else state)
    head = "a head" if "head.weight" in state else "no head (timm: num_classes=0)"
    size = f"depths {sizes['depths']}, dims {sizes['dims']}"
    print(f"{tensors} tensors, {size}, {head}, {len(decoder)} of a decoder left out: {args.output}")


if __name__ == "__main__":
    flags.run_script(main, get_args_parser(), __doc__)
