"""Every denoiser of the zoo is kept and found again by another session, whole and in patches, with equal results."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from zoo import more, recent, transformers, unets, video
from zoo.transformers import Case

import xdit_compile
from xdit_compile import Plan
from xdit_compile.errors import PartitionError
from xdit_compile.ir.results import tensors_of

ZOO: dict[str, Case] = {
    name: case
    for module in (transformers, more, unets, video, recent)
    for table in vars(module).values()
    if isinstance(table, dict) and table and all(isinstance(each, Case) for each in table.values())
    for name, case in table.items()
}
REFUSED = {"hidream": "it runs modules as they are"}
"""What is not kept, and how the log says why."""


@pytest.mark.slow
@pytest.mark.parametrize("degrees", [{}, {"patches": 2}], ids=["whole", "patches"])
@pytest.mark.parametrize("name", sorted(ZOO))
def test_it_is_found(
    name: str, degrees: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO, "xdit_compile")
    args, kwargs = ZOO[name].inputs()
    kwargs.pop("return_dict", None)
    found = []
    for _ in range(2):
        caplog.clear()
        module = xdit_compile.parallelize(ZOO[name].build(), Plan(backend="eager", cache=tmp_path, **degrees))
        try:
            found += [module(*args, **kwargs) for _ in range(2)]
        except PartitionError as refused:
            pytest.skip(str(refused))
    assert REFUSED.get(name, "from the cache") in caplog.text
    expected = ZOO[name].build()(*args, **kwargs)
    assert {type(each) for each in found} == {type(expected)}
    for other in found[1:]:
        assert all(map(torch.equal, tensors_of(found[0]), tensors_of(other)))
