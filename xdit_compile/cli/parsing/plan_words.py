"""Messages about a plan in the words of the command line: errors name its fields, and here are their flags."""

from __future__ import annotations

import ast
import re
from typing import Any

from xdit_compile.plan.methods import METHODS

FLAGS: dict[str, str] = {
    **{method.name: method.flag for method in METHODS},
    "patches": "num_pipeline_patch",
    "warmup_steps": "warmup_steps",
    "stage_layers": "attn_layer_num_for_pp",
    "split_scheme": "split_scheme",
    "vae": "vae_provider",
    "vae_degree": "vae_parallel_degree",
    "vae_memory": "vae_memory",
    "mesh_order": "mesh_order",
    "backend": "backend",
    "compile_mode": "compile_mode",
    "backend_options": "backend_options",
    "attention": "attention",
    "fallback": "fallback",
    "timeout_s": "timeout",
    "compile": "compile",
    "link": "link",
    "without": "without",
    "cache": "cache_dir",
    "target": "target",
}
"""The flag of each field of a plan, and of the other arguments that errors name so."""
_SPECIAL: dict[tuple[str, Any], str] = {
    ("vae", "whole"): "no --use_parallel_vae",
    ("vae", "patch"): "--use_parallel_vae",
    ("cache", None): "--no_cache",
    **{(method.name, 1): f"no --{method.flag}" for method in METHODS if method.flag_degree is not None},
    **{(method.name, method.flag_degree): f"--{method.flag}" for method in METHODS if method.flag_degree is not None},
}
"""Values that a flag stands for by being there or not."""
_VALUE = r"'[^']*'|\"[^\"]*\"|\([^()]*\)|-?[\w.+]+"
_NAME = "|".join(sorted(FLAGS, key=len, reverse=True))
_BARE = "|".join(sorted((name for name in FLAGS if "_" in name), key=len, reverse=True))
"""Names that are no words besides: they stand for the flag without a value, too."""
_ALONE = r"(?<![\w.\-/'\"])"
_SETTING = re.compile(
    rf"(?P<plan>\bPlan\()?{_ALONE}(?P<name>{_NAME})=(?P<value>{_VALUE})(?(plan)\))"
    rf"|{_ALONE}(?P<bare>{_BARE})(?![\w='\"/-]|\.\w)"
)


def in_flags(text: str) -> str:
    """A message with flags in the place of a plan's settings: ``--backend eager`` for ``backend='eager'``."""
    return _SETTING.sub(_flag, text).replace("with no --", "without --").replace("use no --", "leave out --")


def _flag(match: re.Match[str]) -> str:
    if (bare := match["bare"]) is not None:
        return f"--{FLAGS[bare]}"
    name, text = match["name"], match["value"]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if isinstance(value, str | int | None) and (name, value) in _SPECIAL:
        return _SPECIAL[name, value]
    return f"--{FLAGS[name]} {_typed(value)}"


def _typed(value: Any) -> str:
    """A value as it is typed."""
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    return repr(value) if isinstance(value, str) and (not value or " " in value) else str(value)
