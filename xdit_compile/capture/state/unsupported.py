"""What libraries do to weights that a split graph cannot follow yet: each named, with what to do instead."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from xdit_compile.distributed.devices import hooks_of
from xdit_compile.errors import UnsupportedError
from xdit_compile.ir.program import Program
from xdit_compile.weights.released import Released

PLAIN = (nn.Parameter, torch.Tensor, Released)
LOAD_PLAIN = "load the module without a quantization config, or run it whole with Plan(fallback='unsplit')"
STAY = (
    "use enable_model_cpu_offload(), or tensor or pipefusion, with which a rank holds less; or run the module whole "
    "with Plan(fallback='unsplit')"
)
REGISTERED = {"layerwise_casting": "layerwise casting", "group_offloading": "group offload"}
"""Names under which diffusers registers hooks that exchange the weights of a module while it runs."""


def refuse_unsupported(module: nn.Module, name: str) -> None:
    """See to it that the weights of a module are plain tensors which stay where they are.

    Raises:
        UnsupportedError: with the feature of a library that is in the way, and what to do.
    """
    for path, child in module.named_modules():
        where = f"{name}.{path}" if path else name
        for parameter_name, parameter in child._parameters.items():
            if parameter is not None and type(parameter) not in PLAIN:
                kind = type(parameter)
                said = f"{where}.{parameter_name} is a {kind.__name__} of {kind.__module__.partition('.')[0]}"
                raise UnsupportedError(f"{said}, and quantized or wrapped weights cannot be split yet: {LOAD_PLAIN}")
        for feature in _moving(child):
            raise UnsupportedError(f"{where} is under {feature}, whose weights come and go while it runs: {STAY}")
    devices = {str(each.device) for each in module.parameters() if not each.is_meta}
    if len(devices) > 1:
        raise UnsupportedError(
            f"{name} has weights on {' and '.join(sorted(devices))}: every rank needs the module on one device; "
            "load it without device_map"
        )


def refuse_draws(program: Program) -> None:
    """See to it that a program draws no random numbers: ranks would draw others than one process does.

    Raises:
        UnsupportedError: it does.
    """
    for structure in program.structures().values():
        for node in structure.graph.nodes:
            if isinstance(node.target, torch._ops.OpOverload) and _draws(node.target):
                raise UnsupportedError(
                    f"the denoiser draws random numbers itself ({node.target.overloadpacket.__name__}), which ranks "
                    "cannot share yet: give it noise as an input, or run it whole with Plan(fallback='unsplit')"
                )


def _draws(op: torch._ops.OpOverload) -> bool:
    """Whether an operator draws; attention could, if it dropped values."""
    drops = any(argument.name == "dropout_p" for argument in op._schema.arguments)
    return torch.Tag.nondeterministic_seeded in op.tags and not drops


def moves_weights(module: nn.Module) -> bool:
    """Whether a library brings the weights of a module while it runs."""
    return any(feature for child in module.modules() for feature in _moving(child))


def _moving(module: nn.Module) -> Iterator[str]:
    """The features under which the weights of a module come and go."""
    attributes = vars(module)
    registered = getattr(attributes.get("_diffusers_hook"), "hooks", {})
    yield from (REGISTERED[name] for name in registered if name in REGISTERED)
    if any(getattr(hook, "offload", False) for hook in hooks_of(attributes.get("_hf_hook"))):
        yield "sequential offload"
