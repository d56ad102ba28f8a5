"""What ``explain`` answers with for a pipeline: a report of every component that runs split, a line for the rest."""

from __future__ import annotations

import dataclasses

from torch import nn

from .pipeline_report import PipelineReport
from .report import Report


@dataclasses.dataclass(frozen=True)
class ComponentsReport:
    """Each component of a pipeline by its name: how it is split, or in one line why it is not."""

    components: tuple[tuple[str, Report | PipelineReport | str], ...]

    def __getitem__(self, name: str) -> Report | PipelineReport | str:
        return dict(self.components)[name]

    def __str__(self) -> str:
        split = [f"{name}\n{'=' * len(name)}\n{said}" for name, said in self.components if not isinstance(said, str)]
        rest = [f"{name}: {said}" for name, said in self.components if isinstance(said, str)]
        return "\n\n".join([*split, *(["\n".join(rest)] if rest else [])])

    __repr__ = __str__


def whole(module: nn.Module) -> str:
    """What is said of a component that no plan splits: elements of its parameters, and their bytes."""
    count = sum(parameter.numel() for parameter in module.parameters())
    size = sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
    return f"whole on every rank: {count:,} parameters, {size / 2**20:,.1f} MiB"
