"""Trains the small network whose features `xdit-compile evaluate` compares, as a classifier of drawn scenes.

    python examples/train_demo/classifier.py --work classifier_run

Everything random comes from ``--seed``; a run that was stopped goes on when the same command is given again.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import torch
from loop import Phase, Training
from safetensors.torch import save_file
from torch import nn

from xdit_compile.evaluation.drawing import draw
from xdit_compile.evaluation.features import FEATURES, SIDE, WEIGHTS, FeatureNet
from xdit_compile.evaluation.scenes import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    draw_scene,
    held_out,
    training_scenes,
)

PHASES = (Phase(SIDE, 96, 4000),)
SMOKE_PHASES = (Phase(SIDE, 16, 20),)
SEVERAL = {"colour": tuple(COLOURS), "shape": tuple(SHAPES), "place": tuple(PLACES), "size": tuple(SIZES)}
"""Of these a scene may show two, so each name is a question of its own."""
YES_OR_NO = ("striped", "two things")
_HELD_OUT = 2000


class Heads(nn.Module):
    """What the features say of a scene: a logit for each name."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {name: len(names) for name, names in SEVERAL.items()}
        self._sizes = {**sizes, "background": len(BACKGROUNDS), "yes or no": len(YES_OR_NO)}
        self.linear = nn.Linear(FEATURES, sum(self._sizes.values()))

    def forward(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits ``(n, names)`` by head, of features ``(n, 64)``."""
        logits = self.linear(nn.functional.silu(features)).split(list(self._sizes.values()), 1)
        return dict(zip(self._sizes, logits, strict=True))


def labels(scene: Scene) -> dict[str, torch.Tensor]:
    """The right answer of each head: 0 or 1 for each name, the index of the background."""
    shown = {
        "colour": {thing.colour for thing in scene.things},
        "shape": {thing.shape for thing in scene.things},
        "size": {thing.size for thing in scene.things},
        "place": {min(PLACES, key=lambda place: math.dist(PLACES[place], thing.middle)) for thing in scene.things},
    }
    found = {name: torch.tensor([float(one in shown[name]) for one in names]) for name, names in SEVERAL.items()}
    found["background"] = torch.tensor(list(BACKGROUNDS).index(scene.background))
    found["yes or no"] = torch.tensor([float(scene.striped), float(len(scene.things) == 2)])
    return found


def batch(scenes: list[Scene]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Images ``(n, 3, 64, 64)``, float32 from 0 to 1, and the answers of each head."""
    images = torch.from_numpy(np.stack([draw(scene, SIDE) for scene in scenes])).permute(0, 3, 1, 2).float() / 255
    answers = [labels(scene) for scene in scenes]
    return images, {name: torch.stack([answer[name] for answer in answers]) for name in answers[0]}


def disturb(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The images shifted by a pixel or two; half of them blurred, half of them noisy."""
    side = images.shape[-1]
    padded = nn.functional.pad(images, (2, 2, 2, 2), mode="replicate")
    left, top = torch.randint(5, (2,), generator=generator).tolist()
    images = padded[..., top : top + side, left : left + side]
    count = len(images)
    blurred = nn.functional.avg_pool2d(nn.functional.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = torch.where(torch.rand(count, 1, 1, 1, generator=generator) < 0.5, blurred, images)
    strength = 0.1 * torch.rand(count, 1, 1, 1, generator=generator)
    strength *= torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    return (images + strength * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def loss_of(found: dict[str, torch.Tensor], answers: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross entropy, summed over the heads."""
    total = nn.functional.cross_entropy(found["background"], answers["background"])
    for name in (*SEVERAL, "yes or no"):
        each = nn.functional.binary_cross_entropy_with_logits(found[name], answers[name], reduction="none")
        total = total + each.sum(1).mean()
    return total


@torch.no_grad()
def accuracy(net: FeatureNet, heads: Heads, seed: int, count: int) -> dict[str, float]:
    """Share of held-out scenes of which a head says everything right."""
    images, answers = batch([scene for scene, _ in zip(_held_out(seed), range(count), strict=False)])
    found = heads(net(images))
    right = {name: ((found[name] > 0) == (answers[name] > 0.5)).all(1) for name in (*SEVERAL, "yes or no")}
    right["background"] = found["background"].argmax(1) == answers["background"]
    return {name: value.float().mean().item() for name, value in right.items()}


def _held_out(seed: int) -> Iterator[Scene]:
    rng = random.Random(seed)
    while True:
        scene, request = draw_scene(rng, rng.choice((1, 2)))
        if held_out(request):
            yield scene


@torch.no_grad()
def standardise(net: FeatureNet, seed: int, count: int) -> None:
    """Give the features mean 0 and mean variance 1 over drawn scenes, so that distances between them can be read."""
    scenes = training_scenes(seed, two_share=0.5)
    features = net(batch([next(scenes)[0] for _ in range(count)])[0])
    scale = features.var(0).mean().sqrt()
    net.last.weight /= scale
    net.last.bias.copy_((net.last.bias - features.mean(0)) / scale)


@click.command(help=(__doc__ or "").splitlines()[0])
@click.option("--work", type=click.Path(file_okay=False, path_type=Path), required=True, help="Checkpoint and log.")
@click.option("--weights", type=click.Path(dir_okay=False, path_type=Path), default=WEIGHTS, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--smoke", is_flag=True, help="A few steps that show that everything works.")
def main(work: Path, weights: Path, seed: int, threads: int, smoke: bool) -> None:
    """Train, print the accuracy on held-out scenes, scale the features, write the network without its heads."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    net, heads = FeatureNet(), Heads()
    parameters = [*net.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=1e-3)
    phases = SMOKE_PHASES if smoke else PHASES
    training = Training("classifier", work, {"net": net, "heads": heads}, [optimizer], [phases], average=0.995)

    def loss(phase: Phase, step: int) -> torch.Tensor:
        scenes = training_scenes(seed * 1_000_003 + step, two_share=0.5)
        images, answers = batch([next(scenes)[0] for _ in range(phase.batch)])
        generator = torch.Generator().manual_seed(seed + step)
        return loss_of(heads(net(disturb(images, generator))), answers)

    training.run(loss)
    net.load_state_dict(training.averages["net"])
    heads.load_state_dict(training.averages["heads"])
    for name, share in accuracy(net, heads, seed + 1, 100 if smoke else _HELD_OUT).items():
        print(f"{name}: {share:.1%} of held-out scenes right")
    standardise(net, seed + 2, 100 if smoke else _HELD_OUT)
    save_file({name: value.half().contiguous() for name, value in net.state_dict().items()}, weights)
    weights.chmod(0o644)
    print(f"wrote {weights}: {weights.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
