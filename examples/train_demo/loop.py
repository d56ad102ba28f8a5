"""The training loop that every part shares: phases, a schedule, averaged weights, checkpoints and a log of the loss."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of training at one image side (pixels)."""

    side: int
    batch: int
    steps: int


Loss = Callable[[Phase, int], torch.Tensor]


class Training:
    """Trains modules with one loss; stops and resumes at any step with the same random numbers.

    ``loss(phase, step)`` must draw everything random from ``step``. Training goes in rounds of phases: in
    each the rate rises over ``warmup`` steps, stays, and falls to nothing over the last fifth, so that what a round
    leaves is usable and a further one can still be added. Averages of the weights (EMA) are what is kept.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        modules: dict[str, nn.Module],
        optimizers: list[torch.optim.Optimizer],
        rounds: Sequence[Sequence[Phase]],
        average: float = 0.999,
        warmup: int = 100,
        clip: float = 1.0,
    ):
        self._name, self._folder, self._modules, self._optimizers = name, folder, modules, optimizers
        self._rounds, self._average, self._clip = rounds, average, clip
        self._total, self._warmup = sum(_length(phases) for phases in rounds), warmup
        self._rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
        self._step, self._seconds = 0, 0.0
        self._kept = {key: _copy(module) for key, module in modules.items()}
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def averages(self) -> dict[str, dict[str, torch.Tensor]]:
        """The averaged weights of each module."""
        return self._kept

    def run(self, loss: Loss, save_every: float = 120.0) -> None:
        """Train from the last checkpoint, if there is one, to the end."""
        self._resume()
        log, saved = _Log(self._folder / f"{self._name}.csv", self._step), time.monotonic()
        with tqdm(total=self._total, initial=self._step, desc=self._name, smoothing=0.02, mininterval=10) as bar:
            while self._step < self._total:
                start = time.monotonic()
                phase, done, length = self._place()
                self._set_rates(done, length)
                value = loss(phase, self._step)
                value.backward()
                parameters = [p for module in self._modules.values() for p in module.parameters()]
                nn.utils.clip_grad_norm_(parameters, self._clip)
                for optimizer in self._optimizers:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                self._step += 1
                self._follow()
                self._seconds += time.monotonic() - start
                log.add(self._step, phase.side, value.item(), self._seconds)
                bar.update()
                bar.set_postfix(loss=f"{log.mean:.4f}", side=phase.side, refresh=False)
                if time.monotonic() - saved > save_every:
                    self._save()
                    saved = time.monotonic()
        self._save()
        log.close()

    def _place(self) -> tuple[Phase, int, int]:
        """The phase of this step, the steps done in its round, and the length of that round."""
        done = self._step
        for phases in self._rounds:
            length = _length(phases)
            if done < length:
                ends = itertools.accumulate(phase.steps for phase in phases)
                return next(phase for phase, end in zip(phases, ends, strict=True) if done < end), done, length
            done -= length
        raise IndexError(f"step {self._step} lies beyond the last round")

    def _set_rates(self, done: int, length: int) -> None:
        warmup = min(self._warmup, max(length // 10, 1))
        scale = min((done + 1) / warmup, 1.0) * min(1.0, (1 - done / length) / 0.2)
        for optimizer, rates in zip(self._optimizers, self._rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * scale

    @torch.no_grad()
    def _follow(self) -> None:
        weight = min(self._average, (1 + self._step) / (10 + self._step))
        for key, module in self._modules.items():
            for name, value in module.state_dict().items():
                kept = self._kept[key][name]
                if kept.is_floating_point():
                    kept.lerp_(value, 1 - weight)
                else:
                    kept.copy_(value)

    def _save(self) -> None:
        state = {
            "step": self._step,
            "seconds": self._seconds,
            "averages": self._kept,
            "modules": {key: module.state_dict() for key, module in self._modules.items()},
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
        }
        path = self._folder / f"{self._name}.pt"
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def _resume(self) -> None:
        path = self._folder / f"{self._name}.pt"
        if not path.is_file():
            return
        state = torch.load(path, weights_only=True)
        self._step, self._seconds, self._kept = state["step"], state["seconds"], state["averages"]
        for key, module in self._modules.items():
            module.load_state_dict(state["modules"][key])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


class _Log:
    """Mean loss over stretches of steps, as CSV: step, side, loss, seconds."""

    def __init__(self, path: Path, step: int, every: int = 25):
        rows = [row for row in csv.reader(path.open()) if int(row[0]) <= step] if path.is_file() else []
        self._file = path.open("w", newline="", buffering=1)
        self._writer = csv.writer(self._file)
        self._writer.writerows(rows)
        self._every = every
        self._values: list[float] = []
        self.mean = math.nan

    def add(self, step: int, side: int, value: float, seconds: float) -> None:
        self._values.append(value)
        if step % self._every == 0:
            self.mean = sum(self._values) / len(self._values)
            self._writer.writerow([step, side, f"{self.mean:.6f}", f"{seconds:.1f}"])
            self._values.clear()

    def close(self) -> None:
        self._file.close()


def _length(phases: Sequence[Phase]) -> int:
    return sum(phase.steps for phase in phases)


def _copy(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}
