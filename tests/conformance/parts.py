"""Parts that several cases share: autoencoders, schedulers, prompts as embeddings, sizes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import PIL.Image
import torch
from conformance.case import Case
from torch import Tensor, nn
from zoo.pipelines import PIPELINES
from zoo.transformers import Draw, randomise

V = "v_prediction"
FLOW = "flow_prediction"

IMAGE = ({"height": 112, "width": 176}, {"height": 80, "width": 144})
CLIP = ({"height": 80, "width": 112}, {"height": 64, "width": 80})


MORE_STEPS = 4
"""Where a picture is noised by strength, part of the steps are left out."""


def lower_right(size: dict[str, int]) -> torch.Tensor:
    """A mask of the part of a picture that is painted anew."""
    mask = torch.zeros(1, 1, size["height"], size["width"])
    mask[..., 24:, 40:] = 1.0
    return mask


def drawn(model: nn.Module, seed: int = 3) -> nn.Module:
    """A module in evaluation mode with every parameter drawn anew."""
    randomise(model, seed)
    return model.eval().requires_grad_(False)


def kl(latent: int, **config: Any) -> nn.Module:
    """An autoencoder whose latents have ``latent`` channels and an eighth of the picture's rows."""
    return drawn(
        diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(4, 4, 8, 8), norm_num_groups=2, latent_channels=latent, sample_size=64,
            **{"force_upcast": False, **config},
        )
    )  # fmt: skip


def flow(**config: Any) -> Any:
    """The scheduler of most models that were trained by flow matching."""
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def euler(**config: Any) -> Any:
    """A scheduler under which random weights stay of order one."""
    return diffusers.EulerDiscreteScheduler(prediction_type=V, steps_offset=1, **config)


def none(*names: str) -> dict[str, None]:
    """Components that are left out."""
    return dict.fromkeys(names)


def like(name: str, cls: Any, **more: Any) -> Any:
    """A pipeline of class ``cls`` from the parts of another in the zoo, and ``more``; what it lacks is None."""
    given = {**PIPELINES[name].build().components, **more}
    wanted = [each for each in inspect.signature(cls.__init__).parameters if each != "self"]
    optional = {"requires_safety_checker": False, "add_watermarker": False}
    return cls(**{each: given.get(each, optional.get(each)) for each in wanted if each in given or each in optional})


def prompts(d: Draw, *, text: int = 13, dim: int = 28, pooled: int = 0, negative: bool = True,
            lengths: tuple[int, int] | None = None, suffix: str = "", mask: str = "") -> dict[str, Any]:  # fmt: skip
    """Embeddings (1, text, dim) of a prompt and its negative; pooled vectors and padding masks where asked."""
    given: dict[str, Any] = {}
    for at, sign in enumerate(("", "negative_") if negative else ("",)):
        given[f"{sign}prompt_embeds{suffix}"] = d.normal(1, text, dim)
        if pooled:
            given[f"{sign}pooled_prompt_embeds"] = d.normal(1, pooled)
        if lengths:
            given[f"{sign}{mask or 'prompt_attention_mask'}{suffix}"] = d.mask([lengths[at]], text)
    return given


def picture(d: Draw, size: dict[str, int]) -> Tensor:
    """A picture of these sizes, (1, 3, height, width) between 0 and 1."""
    return d.normal(1, 3, size["height"], size["width"]).sigmoid()


def photo(d: Draw, size: dict[str, int]) -> PIL.Image.Image:
    """The same as a rounded picture."""
    pixels = (picture(d, size)[0].permute(1, 2, 0) * 255).round().byte()
    return PIL.Image.fromarray(pixels.numpy())


def known(name: str, *second: dict[str, Any], **more: Any) -> Case:
    """A case of the zoo; ``second`` changes arguments of its second request, ``more`` fields of the case."""
    zoo = PIPELINES[name]

    def arguments(d: Draw, request: int) -> dict[str, Any]:
        changed = second[0] if request and second else {}
        return {**zoo.arguments(d), **zoo.extra, **changed}

    return Case(**{"name": name, "make": zoo.build, "arguments": arguments, **more})


def by_size(make: Callable[[Draw, dict[str, int]], dict[str, Any]], sizes: tuple = IMAGE) -> Callable[..., Any]:
    """Arguments of a request from what ``make`` gives for its size."""
    return lambda d, request: {**make(d, sizes[request]), **sizes[request]}
