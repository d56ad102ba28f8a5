"""A small network whose features stand for what an image shows; trained on drawn scenes, not on photographs."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

WEIGHTS = Path(__file__).with_name("features.safetensors")
SIDE = 64
CHANNELS = (24, 32, 48, 64)
FEATURES = 64


class FeatureNet(nn.Module):
    """Four convolutions of stride 2, then one linear layer over what is left of the image.

    ``examples/train_demo/classifier.py`` trains it as the trunk of a classifier of drawn scenes; over these its
    features have mean 0 and mean variance 1.
    """

    def __init__(self) -> None:
        super().__init__()
        channels = (3, *CHANNELS)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(given, made, 3, stride=2, padding=1), nn.ReLU())
            for given, made in zip(channels, CHANNELS, strict=False)
        )
        self.last = nn.Linear(CHANNELS[-1] * (SIDE >> len(CHANNELS)) ** 2, FEATURES)

    def layers(self, images: torch.Tensor) -> list[torch.Tensor]:
        """What each convolution makes of images ``(n, 3, height, width)``, float32 from 0 to 1, of any size."""
        activations = []
        value = 2 * images - 1
        for stage in self.stages:
            value = stage(value)
            activations.append(value)
        return activations

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features ``(n, 64)`` of images ``(n, 3, height, width)`` from 0 to 1, resized to 64 x 64; float32."""
        small = nn.functional.interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=True)
        return self.last(self.layers(small)[-1].flatten(1))


def load_features() -> FeatureNet:
    """The trained network, for evaluation only."""
    from safetensors.torch import load_file

    net = FeatureNet()
    net.load_state_dict({name: value.float() for name, value in load_file(WEIGHTS).items()})
    return net.eval().requires_grad_(False)
