"""What the operations of a traced graph are to the tracer: the names of their kinds, and what surrounds a node."""
from typing import Any

from nnunet_transplant.alignment.graph import Node

DROPOUT = {"dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout"}
RESAMPLING = {f"{how}{dim}d" for dim in (1, 2, 3)
             for how in ("avg_pool", "max_pool", "adaptive_avg_pool", "upsample_nearest")
             } | {"upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d"}
CARRY = DROPOUT | RESAMPLING | {"alias", "clone", "contiguous", "detach"}
ENTRY_BY_ENTRY = DROPOUT | {
    "add", "sub", "rsub", "mul", "div", "pow", "sqrt", "rsqrt", "neg", "abs", "exp", "sigmoid", "tanh", "relu",
    "leaky_relu", "elu", "gelu", "silu", "mish", "hardtanh", "hardsigmoid", "hardswish", "celu", "selu", "softplus",
    "relu6", "clamp", "maximum", "minimum", "to", "clone", "contiguous", "alias", "detach"}
REARRANGING = {"view", "reshape", "permute", "transpose", "flatten", "unflatten", "slice", "select", "unbind", "chunk",
               "split", "split_with_sizes", "expand", "expand_as", "squeeze", "unsqueeze", "narrow", "movedim",
               "repeat", "t", "_unsafe_view", "unfold"}


def norms_units(node: Node) -> bool:
    """Whether it takes away each unit's own scale and shift."""
    return kind_of(node) in ("instance_norm", "batch_norm") or (
        kind_of(node) == "group_norm" and node.args[1] == node.meta["val"].shape[1])


def meets_norm(node: Node) -> bool:
    """Whether all that becomes of a value is that a norm takes away each unit's scale and shift."""
    while len(node.users) == 1:
        node = next(iter(node.users))
        if norms_units(node):
            return True
        if kind_of(node) not in DROPOUT:
            break
    return False


def kind_of(node: Node) -> str:
    """The name of a node's operation: "add" for aten.add_.Tensor."""
    return getattr(node.target, "__name__", str(node.target)).split(".")[0].rstrip("_")


def module_of(node: Node) -> str:
    """The module of the network that a node belongs to."""
    stack = node.meta.get("nn_module_stack")
    return (next(reversed(stack.values()))[0] if stack else "") or "the network"


def argument_of(node: Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
