"""What explain says of a whole pipeline."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiffusionPipeline

import xdit_compile
from xdit_compile.cli.options.request import DEMO_PIPELINE
from xdit_compile.errors import UsageError
from xdit_compile.plan import Plan
from xdit_compile.reports.report import Report


def test_every_component_of_a_pipeline_is_told() -> None:
    pipe = DiffusionPipeline.from_pretrained(DEMO_PIPELINE)
    with pytest.raises(UsageError, match="this pipeline is not parallelized"):
        xdit_compile.explain(pipe)
    pipe = xdit_compile.parallelize(pipe, Plan(backend="eager", cache=None, vae="patch"))
    pipe.set_progress_bar_config(disable=True)
    assert "transformer: nothing to explain yet: call the pipeline once" in str(xdit_compile.explain(pipe))
    pipe("a red circle", num_inference_steps=1, output_type="latent", generator=torch.Generator().manual_seed(0))
    said = xdit_compile.explain(pipe)
    assert isinstance(said["transformer"], Report) and said["transformer"].blocks == 8
    assert "whole on every rank: 337,920 parameters, 1.3 MiB" in said["text_encoder"]
    assert str(said).startswith("transformer\n===") and "\ntext_encoder: whole" in str(said)
    assert "vae" in dict(said.components)
