"""Attention of other packages: what reaches them, what comes back, and why one cannot be used.

None of them runs on a CPU, so that here stand others in their places (`packages/`), with the signatures of the real
ones. `test_kernels_on_gpu.py` runs the real ones where they are installed.
"""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import procs
import pytest
import torch
from torch.utils import _pytree as pytree
from zoo import transformers as zoo

import xdit_compile
import xdit_compile.kernels.attention
from xdit_compile import Plan
from xdit_compile.errors import ProviderUnavailable, XditCompileError
from xdit_compile.kernels.attention_packages.installed import is_there, version_of
from xdit_compile.kernels.providers import AttentionQuery
from xdit_compile.kernels.reference import attention_reference
from xdit_compile.kernels.registry import BEST_FIRST, PROVIDERS, choose, exactly, inexact
from xdit_compile.plan.plan import INEXACT_ATTENTIONS
from xdit_compile.runtime import proving
from xdit_compile.runtime.verify.inexact import Moved

OPS = torch.ops.xdit_compile
PACKAGES = Path(__file__).parent / "packages"
MODULES = {"flash_attn_3": "flash_attn_interface", "flash_attn_4": "flash_attn.cute", "sage": "sageattention"}
CLOSE = {"flash_attn_3": 1e-2, "flash_attn_4": 1e-2, "sage": 4e-2}
H100 = AttentionQuery("cuda", torch.bfloat16, 8, 8, 64, 64, 64, 64, capability=(9, 0))


def forget() -> None:
    """Look for packages anew."""
    is_there.cache_clear()
    version_of.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] in {"flash_attn", *MODULES.values()}]:
        del sys.modules[name]


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    if any(is_there(module) for module in MODULES.values()):
        pytest.skip("a real one is installed")
    forget()
    monkeypatch.syspath_prepend(str(PACKAGES))
    yield PACKAGES
    forget()


def anywhere(name: str) -> Any:
    """Let a provider run on this device; the rest of it stays."""
    return mock.patch.dict(PROVIDERS, {name: dataclasses.replace(PROVIDERS[name], refusals=())})


def module_of(name: str) -> ModuleType:
    return sys.modules[MODULES[name]]


def qkv(kv_heads: int = 6, keys: int = 70) -> list[torch.Tensor]:
    """Tokens before heads in memory, as models have it; keys whose mean is not 0."""
    torch.manual_seed(0)
    shapes = ((50, 6), (keys, kv_heads), (keys, kv_heads))
    q, k, v = (torch.randn(2, tokens, heads, 32, dtype=torch.bfloat16).transpose(1, 2) for tokens, heads in shapes)
    return [q, k + 0.5, v]


@pytest.mark.parametrize("kv_heads", [6, 2])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", sorted(MODULES))
def test_arguments_arrive_and_results_come_back_as_the_op_has_them(packages, name, causal, kv_heads):
    q, k, v = qkv(kv_heads, 50 if causal else 70)
    expected, log = attention_reference(q, k, v, None, causal, 0.3, kv_heads != 6)
    with anywhere(name):
        out, lse = OPS.attention_lse(q, k, v, None, causal, 0.3, kv_heads != 6, name)
        alone = OPS.attention(q, k, v, None, causal, 0.3, kv_heads != 6, name)
    shape = tuple(q.shape) if name == "sage" else (2, 50, 6, 32)
    call = {"shape": shape, "scale": 0.3, "causal": causal}
    assert [call, call] == module_of(name).CALLS
    assert torch.equal(out, alone) and out.dtype == q.dtype and lse.dtype == torch.float32
    for one, other in ((out, expected), (lse, log)):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= CLOSE[name] * other.abs().max()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_parts_are_merged_by_their_log_sum_exps(packages, name):
    """As the ring does: a log-sum-exp of another base, or of keys without their mean, would weigh parts otherwise."""
    q, k, v = qkv()
    k = torch.cat([k[:, :, :20] - 1, k[:, :, 20:] + 1], 2)
    expected = attention_reference(q, k, v)[0]
    with anywhere(name):
        parts = [OPS.attention_lse(q, k[:, :, at], v[:, :, at], provider=name) for at in (slice(20), slice(20, 70))]
    weights = torch.stack([lse for _, lse in parts]).softmax(0).unsqueeze(-1)
    found = sum(weight * out for weight, (out, _) in zip(weights, parts, strict=True))
    assert (found - expected).abs().max() <= CLOSE[name] * expected.abs().max()


def test_flash_attention_3_of_every_age(packages, monkeypatch):
    q, k, v = qkv()
    with anywhere("flash_attn_3"):
        expected = OPS.attention_lse(q, k, v, provider="flash_attn_3")
        module = module_of("flash_attn_3")
        monkeypatch.setattr(module, "flash_attn_func", module.always_both)
        assert torch.equal(OPS.attention(q, k, v, provider="flash_attn_3"), expected[0])
        assert torch.equal(OPS.attention_lse(q, k, v, provider="flash_attn_3")[1], expected[1])
        monkeypatch.setattr(module, "flash_attn_func", module.without_lse)
        assert torch.equal(OPS.attention(q, k, v, provider="flash_attn_3"), expected[0])
        with pytest.raises(ProviderUnavailable, match="'flash_attn_3' of this version gives no log-sum-exp"):
            OPS.attention_lse(q, k, v, provider="flash_attn_3")
        for which, words in ((0, r"gave \(2, 50, 6, 32\) for \(2, 6, 50, 32\)"), (1, r"log-sum-exp of \(2, 50, 6\)")):

            def turned(*args, which=which, **rest):
                made = list(module.always_both(*args, **rest))
                made[which] = made[which].transpose(1, 2)
                return made

            monkeypatch.setattr(module, "flash_attn_func", turned)
            with pytest.raises(ProviderUnavailable, match=words):
                OPS.attention_lse(q, k, v, provider="flash_attn_3")


def test_flash_attn_4_alone_is_not_flash_attn_2(packages, tmp_path, monkeypatch):
    assert PROVIDERS["flash_attn_4"].unsupported(H100) is None
    assert "is not installed (flash_attn)" in str(PROVIDERS["flash_attn"].unsupported(H100))
    forget()
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("raise ImportError('undefined symbol')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert PROVIDERS["flash_attn"].unsupported(H100) is None
    assert "is not installed (flash_attn.cute)" in str(PROVIDERS["flash_attn_4"].unsupported(H100))
    with anywhere("flash_attn"), pytest.raises(ProviderUnavailable, match="flash_attn cannot be loaded: undefined"):
        OPS.attention(*qkv(), provider="flash_attn")


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("flash_attn_3", {"capability": (8, 0)}, "needs a card of sm_90, this is sm_80"),
        ("flash_attn_3", {"capability": (10, 0)}, "needs a card of sm_90, this is sm_100"),
        ("flash_attn_3", {"head_dim": 264, "v_head_dim": 264}, "up to 256, not 264"),
        ("flash_attn_3", {"head_dim": 20, "v_head_dim": 20}, "multiples of 8"),
        ("flash_attn_3", {"v_head_dim": 32}, "equal head dims"),
        ("flash_attn_3", {"dtype": torch.float32}, "float16, bfloat16 on cuda, not float32"),
        ("flash_attn_3", {"mask": "bool"}, "takes no mask"),
        ("flash_attn_3", {"is_causal": True, "q_tokens": 8}, "causal"),
        ("flash_attn_4", {"capability": (8, 9)}, "needs a card of sm_90, sm_100, sm_103 or sm_110, this is sm_89"),
        ("flash_attn_4", {"capability": (10, 0), "head_dim": 192, "v_head_dim": 192}, "up to 128, not 192, on sm_100"),
        ("sage", {"head_dim": 256, "v_head_dim": 256}, "up to 128, not 256"),
        ("sage", {"capability": (10, 0)}, "sm_80, sm_86, sm_89, sm_90 or sm_120, this is sm_100"),
        ("sage", {"mask": "additive", "lse": True}, "takes no mask"),
        ("sage", {"device": "cpu"}, "runs on cuda, not on cpu"),
    ],
)
def test_limits_are_told_in_one_clause(packages, name, changes, words):
    query = dataclasses.replace(H100, **changes)
    with pytest.raises(ProviderUnavailable, match=words) as refused:
        choose(name, query)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("name", "head_dim"), [("flash_attn_3", 256), ("flash_attn_4", 256), ("sage", 72)])
def test_what_they_take(packages, name, head_dim):
    for lse in (False, True):
        query = dataclasses.replace(H100, head_dim=head_dim, v_head_dim=head_dim, kv_heads=2, lse=lse)
        assert choose(name, query).name == name
        assert choose("auto", query).name == ("sdpa_flash" if lse else "sdpa")


@pytest.mark.parametrize("name", sorted(MODULES))
def test_without_the_package_its_command_is_told(name):
    is_there.cache_clear()
    if is_there(MODULES[name]):
        pytest.skip(f"{name} is installed")
    with pytest.raises(ProviderUnavailable, match=rf"is not installed \({MODULES[name]}\); run: "):
        choose(name, H100)


def test_the_first_sageattention_is_refused(packages, tmp_path, monkeypatch):
    """It subtracts the mean from the keys where they are, which the graph may read again."""
    for version, words in (("1.0.6", r"needs sageattention 2.2 or later, this is 1.0.6"), ("2.2.0", "")):
        (tmp_path / version / f"sageattention-{version}.dist-info").mkdir(parents=True)
        metadata = tmp_path / version / f"sageattention-{version}.dist-info" / "METADATA"
        metadata.write_text(f"Metadata-Version: 2.1\nName: sageattention\nVersion: {version}\n")
        monkeypatch.syspath_prepend(str(tmp_path / version))
        version_of.cache_clear()
        reason = PROVIDERS["sage"].unsupported(H100)
        assert words in str(reason) if words else reason is None


def test_only_sage_is_not_exact_and_never_taken_by_default(packages):
    assert {name for name in PROVIDERS if inexact(name)} == {*INEXACT_ATTENTIONS} == {"sage"}
    assert {*BEST_FIRST} == {*PROVIDERS} - {*INEXACT_ATTENTIONS}
    with exactly():
        assert choose("sage", H100).name == "sdpa"
        assert choose("flash_attn_3", H100).name == "flash_attn_3"
        with pytest.raises(ProviderUnavailable, match="takes no mask"):
            choose("sage", dataclasses.replace(H100, mask="bool"))
    assert choose("sage", H100).name == "sage"
    assert Plan(attention="sage", vae="patch", ulysses=2).rows.attention == "auto"
    assert Plan(attention="chunked", vae="patch", ulysses=2).rows.attention == "chunked"


def test_how_far_a_result_may_move():
    torch.manual_seed(0)
    expected, noise = torch.randn(40, 50), torch.randn(40, 50)
    assert Moved.of(expected, expected.clone()) == Moved() and Moved().allowed
    near = Moved.of(expected + 0.1 * noise, expected)
    assert near.allowed and near.apart == pytest.approx(0.1, rel=0.1) and near.cosine == pytest.approx(0.995, abs=1e-3)
    assert not Moved.of(expected + 0.2 * noise, expected).allowed
    assert not Moved.of(1.2 * expected, expected).allowed, "a cosine alone sees no scale"
    expected[0, 0] = float("nan")
    assert Moved.of(expected.clone(), expected).allowed
    assert not Moved.of(expected.nan_to_num(), expected).allowed


def split_by_sage(rank: int, plan: Plan, factor: float, broken: bool) -> tuple[str, float, list[str], int]:
    """What a call says that has this plan: its error, how far its result lies off, its warnings, calls of the kernel.

    Results are multiplied by ``factor`` before they are compared; a ``broken`` kernel gives the values themselves.
    """
    sys.path.insert(0, str(PACKAGES))
    import sageattention

    case = zoo.MODELS["dit"]
    module, (args, kwargs) = case.build(), case.inputs()
    own, assemble = sageattention.sageattn, proving.assemble

    def kernel(q, k, v, **rest):
        out = own(q, k, v, **rest)
        return v.flip(2)[:, :, : q.shape[2]] if broken else out

    def scaled(program, tensors):
        return assemble(program, tuple(x * factor for x in tensors))

    with torch.no_grad():
        expected = pytree.tree_leaves(module(*args, **kwargs))
    with (
        anywhere("sage"),
        mock.patch.object(sageattention, "sageattn", kernel),
        mock.patch.object(proving, "assemble", scaled),
        warnings.catch_warnings(record=True) as told,
    ):
        warnings.simplefilter("always")
        xdit_compile.parallelize(module, plan)
        try:
            found = pytree.tree_leaves(module(*args, **kwargs))
            worst = max(Moved.of(one, other).apart for one, other in zip(found, expected, strict=True))
            error = ""
        except XditCompileError as raised:
            error, worst = f"{type(raised).__name__}: {raised}", 0.0
    texts = [str(each.message) for each in told if "attention" in str(each.message)]
    return error, worst, texts, len(sageattention.CALLS)


@pytest.mark.parametrize("degree", ["ulysses", "ring"])
def test_what_it_changes_is_told_and_let_pass(degree):
    plan = Plan(**{degree: 2}, attention="sage", backend="eager", cache=None)
    (error, worst, told, calls), other = procs.run(split_by_sage, 2, plan, 1.0, False)
    assert error == other[0] == "" and calls and other[2] == []
    assert len(told) == 1 and "attention='sage' is not exact: it moves what module gives by " in told[0]
    assert 1e-5 < worst < 0.05 and f"{worst:.1e} of its values (at most 0.15)" in told[0]


def test_too_far_a_result_is_refused():
    plan = Plan(ulysses=2, attention="sage", backend="eager", cache=None)
    for error, _, told, _ in procs.run(split_by_sage, 2, plan, 1.0, True):
        assert error.startswith("VerificationError: attention='sage' moves what") and "attention='auto'" in error
        assert not told


def test_a_wrong_split_is_found_as_exactly_as_with_another_provider():
    """A thousandth off would be nothing beside int8: the split is compared with exact attention in its place."""
    plan = Plan(ulysses=2, attention="sage", backend="eager", cache=None)
    for error, _, _, calls in procs.run(split_by_sage, 2, plan, 1.001, False):
        assert error.startswith("VerificationError: output 0 of the split program differs") and not calls


def test_explain_says_who_computes_attention_and_why_others_cannot(packages):
    case = zoo.MODELS["dit"]
    module, (args, kwargs) = case.build(), case.inputs()
    lines = xdit_compile.explain(module, Plan(ring=2, attention="sage"), args, kwargs).attention
    assert lines[0].startswith("attention by sage, not exact: queries and keys are multiplied in int8")
    assert lines[0].endswith("; here it runs on cuda, not on cpu")
    lines = xdit_compile.explain(module, Plan(ring=2), args, kwargs).attention
    assert lines[0] == "attention by sdpa_flash (auto)"
    assert "attention not by sdpa_efficient, sdpa_cudnn, flash_attn_3, flash_attn_4, sage: runs on cuda" in str(lines)
