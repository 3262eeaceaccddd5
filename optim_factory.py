"""Parameter groups for the optimizer."""


def get_parameter_groups(model, weight_decay):
    """Two groups for an optimizer: weights, which decay, and norms, biases, GRN and mask token, which do not."""
    decay, no_decay = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            exempt = parameter.ndim == 1 or ".grn." in name or name.endswith("mask_token")
            (no_decay if exempt else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
