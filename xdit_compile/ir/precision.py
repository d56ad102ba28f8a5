"""Numbers of float32 as they are, while two results are compared: no TF32 on a GPU, no bfloat16 on a CPU."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

FREE = ("tf32", "bf16")
"""What a place may say that makes products of float32 another dtype's."""
NOT_SET = "none"
PRODUCTS = (("cuda", "matmul"), ("mkldnn", "matmul"))
"""The places by which compilers go."""


def precision_for(results: Sequence[torch.Tensor]) -> AbstractContextManager[None]:
    """`full_precision` where some of the results that are compared have float32's digits or more.

    Others are rounded by more than TF32, and a compiler that is called meanwhile would have to be called again.
    """
    wide = any(not each.dtype.is_floating_point or torch.finfo(each.dtype).bits > 16 for each in results)
    return full_precision() if wide else nullcontext()


@contextmanager
def full_precision() -> Iterator[None]:
    """Have products and convolutions of float32 keep its digits; afterwards every setting is what it was.

    Sums of TF32 products differ by 1e-4 by their order alone. PyTorch has two ways to allow it, and refuses to be asked
    in the one where the other says something else, as compilers do: both say no meanwhile. Where nothing allows it,
    nothing is touched.
    """
    before = said()
    if not any(value in FREE for value in before):
        yield
        return
    legacy = _forbid(before)
    try:
        yield
    finally:
        _give_back(before, legacy)


def _places() -> list[tuple[str, str]]:
    """What is asked, each after what it goes by where it is not set itself."""
    kinds = [(backend, what) for backend in ("cuda", "mkldnn") for what in ("all", "matmul", "conv", "rnn")]
    return [("generic", "all"), *kinds]


def said() -> list[str]:
    """What all places say."""
    return [torch._C._get_fp32_precision_getter(*place) for place in _places()]


def products() -> tuple[str, ...]:
    """What products of float32 may be, as far as compilers go by it."""
    return tuple(torch._C._get_fp32_precision_getter(*place) for place in PRODUCTS)


def set_products(values: Sequence[str]) -> None:
    """Have products be what `products` said elsewhere."""
    for place, value in zip(PRODUCTS, values, strict=True):
        _say(place, value)


def _say(place: tuple[str, str], value: str) -> None:
    torch._C._set_fp32_precision_setter(*place, value)


def _forbid(before: list[str]) -> tuple[str, bool]:
    """Say no in both ways; what the older one said can be asked once the newer one allows nothing.

    Returns:
        What it said of products, empty where that is no, and of convolutions.
    """
    for place, value in zip(_places(), before, strict=True):
        if value in FREE:
            _say(place, "ieee")
    said = torch.get_float32_matmul_precision()
    legacy = "" if said == "highest" else said, _convolutions()
    _say_legacy(legacy[0] and "highest", False)
    return legacy


def _convolutions() -> bool:
    """Whether the older way allows TF32 in convolutions; it is refused where it says more than the newer one."""
    try:
        return torch._C._get_cudnn_allow_tf32()
    except RuntimeError:
        return True


def _say_legacy(matmul: str, convolutions: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if matmul:
            torch.set_float32_matmul_precision(matmul)
        torch._C._set_cudnn_allow_tf32(convolutions)


def _give_back(before: list[str], legacy: tuple[str, bool]) -> None:
    _say_legacy(*legacy)
    for place, value in zip(_places(), before, strict=True):
        _say(place, NOT_SET)
        if torch._C._get_fp32_precision_getter(*place) != value:
            _say(place, value)
