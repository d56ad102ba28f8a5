"""The distvae package in the place of our own split, for the autoencoders that it has adapters for."""

from __future__ import annotations

import copy
import importlib.util

from torch import nn

from xdit_compile.distributed.mesh import Mesh
from xdit_compile.errors import ProviderUnavailable
from xdit_compile.kernels.collectives.process_groups import process_group

HALVES = ("decoder", "encoder")
KEPT = "_xdit_compile_halves"


def check_distvae(module: nn.Module) -> None:
    """See to it that distvae is there and knows this autoencoder's decoder.

    Raises:
        ProviderUnavailable: with what to do instead.
    """
    if importlib.util.find_spec("distvae") is None:
        raise ProviderUnavailable("vae='distvae' needs the package: pip install distvae; or use vae='patch'")
    from distvae.vae import decoder_adapter_name

    if decoder_adapter_name(module) is None:
        raise ProviderUnavailable(
            f"distvae has no adapter for the decoder of a {type(module).__name__}; use vae='patch'"
        )


def attach_distvae(module: nn.Module, mesh: Mesh) -> None:
    """Have distvae rebuild the halves of an autoencoder that it has adapters for; `restore_distvae` undoes it.

    To be called where the process groups of ``mesh`` are found.
    """
    from distvae.vae import encoder_adapter_name, parallelize_decoder, parallelize_encoder

    kept = {name: getattr(module, name) for name in HALVES}
    group = process_group(mesh.group("ring"))
    for name, half in kept.items():
        setattr(module, name, _copied(half))
    parallelize_decoder(module, group)
    if encoder_adapter_name(module) is not None:
        parallelize_encoder(module, group)
    object.__setattr__(module, KEPT, kept)


def _copied(half: nn.Module) -> nn.Module:
    """A module tree of its own over the same weights: distvae changes the one that it is given."""
    shared = {id(tensor): tensor for tensor in [*half.parameters(), *half.buffers()]}
    return copy.deepcopy(half, shared)


def restore_distvae(module: nn.Module) -> None:
    """Give the autoencoder its own halves back, where distvae had them."""
    for name, half in vars(module).pop(KEPT, {}).items():
        setattr(module, name, half)


def is_distvae(module: nn.Module) -> bool:
    """Whether distvae runs this autoencoder."""
    return KEPT in vars(module)
