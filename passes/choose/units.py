"""What every kind of parallelism of a plan splits."""

from __future__ import annotations

import dataclasses

from xdit_compile.passes.axes.infer import Inference
from xdit_compile.passes.local.layout import Chosen
from xdit_compile.plan import Plan
from xdit_compile.plan.methods import GATHERED, PATCH, SEQUENCE, TENSOR

from .batch import choose_batch
from .features import choose_features
from .tokens import choose_tokens


def choose_units(inference: Inference, plan: Plan) -> Chosen:
    """What each kind of parallelism in the plan splits; a batch of one is not split, its calls are shared instead.

    Of a plan with patches ranks share the tokens of each patch: what that splits follows from the patches.
    """
    return {
        **choose_batch(inference, plan.data, plan.cfg),
        PATCH: choose_tokens(inference, plan, PATCH),
        SEQUENCE: choose_tokens(inference, plan) if plan.patch_count == 1 else (),
        GATHERED: choose_tokens(inference, plan, GATHERED),
        TENSOR: choose_features(inference, plan),
    }


def choose_within_batch(inference: Inference, plan: Plan) -> Chosen:
    """The same for a call that is one rank's part of a batch, so that no rank shares it."""
    return choose_units(inference, dataclasses.replace(plan, data=1, cfg=1))
