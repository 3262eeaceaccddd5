"""Parameter groups, layer decay and the optimizer."""

from timm.optim import create_optimizer_v2


def get_num_layer_for_convnext_single(var_name, depths):
    """Layer id of a parameter where each block is a layer: 1 (the stem) to sum(depths) + 1 (norm and head)."""
    kind, *numbers = var_name.split(".")
    if kind == "downsample_layers":
        return sum(depths[: int(numbers[0])]) + 1
    if kind == "stages":
        return sum(depths[: int(numbers[0])]) + int(numbers[1]) + 1
    return sum(depths) + 1


def get_num_layer_for_convnext(var_name):
    """Layer id of a parameter in 12 groups of three consecutive blocks, for depths 3, 3, 27, 3: 0 (the stem) to 13."""
    kind, *numbers = var_name.split(".")
    if kind == "downsample_layers":
        return (0, 2, 3, 12)[int(numbers[0])]
    if kind == "stages":
        stage, block = int(numbers[0]), int(numbers[1])
        return (1, 2, 3 + block // 3, 12)[stage]
    return 13


class LayerDecayValueAssigner:
    """The factor on the learning rate of each layer: `values[layer id]`.

    layer_decay_type: "single" (each block a layer) or "group" (three blocks; ValueError but for depths 3, 3, 27, 3).
    """

    def __init__(self, values, depths=(3, 3, 27, 3), layer_decay_type="single"):
        if layer_decay_type == "group" and tuple(depths) != (3, 3, 27, 3):
            raise ValueError(
                f"layer decay 'group' is made for depths (3, 3, 27, 3), not {tuple(depths)}: take 'single'"
            )
        self.values, self.depths, self.layer_decay_type = values, depths, layer_decay_type

    @classmethod
    def of_decay(cls, decay, depths, layer_decay_type):
        """Factors decay ** (layers above), 1 for norm and head."""
        layers = 12 if layer_decay_type == "group" else sum(depths)
        return cls([decay ** (layers + 1 - i) for i in range(layers + 2)], depths, layer_decay_type)

    def get_scale(self, layer_id):
        return self.values[layer_id]

    def get_layer_id(self, var_name):
        if self.layer_decay_type == "group":
            return get_num_layer_for_convnext(var_name)
        return get_num_layer_for_convnext_single(var_name, self.depths)


def get_parameter_groups(model, weight_decay=1e-5, skip_list=(), get_num_layer=None, get_layer_scale=None):
    """Groups for an optimizer: weights decay; norms, biases, GRN, mask token and names in skip_list do not.

    With get_num_layer(name) -> id and get_layer_scale(id) -> factor two groups a layer, with that `lr_scale`.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        exempt = parameter.ndim == 1 or ".grn." in name or name.endswith("mask_token") or name in skip_list
        layer = get_num_layer(name) if get_num_layer else None
        if (layer, exempt) not in groups:
            groups[layer, exempt] = {
                "params": [],
                "weight_decay": 0.0 if exempt else weight_decay,
                "decays": not exempt,
                "lr_scale": get_layer_scale(layer) if get_layer_scale else 1.0,
            }
        groups[layer, exempt]["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def create_optimizer(args, model, get_num_layer=None, get_layer_scale=None, filter_bias_and_bn=True, skip_list=()):
    """timm's optimizer args.opt for the parameter groups of a model. Raises ValueError if timm has none of that name.

    filter_bias_and_bn: False lets weight decay act on all parameters.
    """
    groups = get_parameter_groups(model, args.weight_decay, skip_list, get_num_layer, get_layer_scale)
    if not filter_bias_and_bn:
        groups = [group | {"weight_decay": args.weight_decay, "decays": True} for group in groups]
    options = {"eps": args.opt_eps, "betas": tuple(args.opt_betas) if args.opt_betas else None}
    return create_optimizer_v2(
        groups,
        opt=args.opt,
        lr=args.lr,
        weight_decay=args.weight_decay,
        momentum=args.momentum,
        **{name: value for name, value in options.items() if value is not None},
    )
