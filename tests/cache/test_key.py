"""The key of a cached program: equal in other processes, another for every change that makes another program."""

from __future__ import annotations

import collections
import functools
import importlib
import json
import os
import subprocess
import sys
import textwrap
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, CpuOffload, add_hook_to_module
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_processor import AttnProcessor
from torch import nn
from torch.nn.utils import parametrizations
from zoo.more import MORE
from zoo.transformers import MODELS

import xdit_compile
from xdit_compile import Plan
from xdit_compile.cache import environment as environments
from xdit_compile.cache.environment import environment
from xdit_compile.cache.portable import describe_call, describe_module, describe_value
from xdit_compile.cache.sources import Digests, fits, manifest, own_sources, recorded
from xdit_compile.cache.unportable import Unportable
from xdit_compile.cache.values import digest_of
from xdit_compile.capture.state.in_place import put_back, put_in_place
from xdit_compile.weights.released import Refusals, released

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
BLOCK = "transformer_blocks.1.attn1"
"""A part of the model that changes are made to."""


class LowRank(nn.Module):
    """A linear layer with low-rank updates, as adapter libraries put it in the place of the layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.down = nn.ModuleDict({"one": nn.Linear(base.in_features, 2, bias=False)})
        self.up = nn.ModuleDict({"one": nn.Linear(2, base.out_features, bias=False)})
        self.scaling, self.active, self.targets = {"one": 0.5}, ["one"], {"to_q", "to_k", "to_v"}
        self.disabled = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.base_layer(x)
        for name in [] if self.disabled else self.active:
            result = result + self.scaling[name] * self.up[name](self.down[name](x))
        return result


class Scaled:
    """A processor with settings."""

    __slots__ = ("inner", "kept")

    def __init__(self) -> None:
        self.inner, self.kept = AttnProcessor(), collections.deque([{"names": frozenset("abc")}])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


class Table(nn.Module):
    """A module with whatever else may hang on one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.table, self.numbers = torch.arange(3.0), np.ones(2)
        self.tables = {7: [torch.ones(2), (None, 1.0)], "self": self.linear}
        self.act = torch.nn.functional.gelu
        self.silu = functools.partial(torch.nn.functional.silu, inplace=False)
        self.again, self.weight = self.tables, self.linear.weight
        self.back = weakref.ref(self.linear)
        self.method, self.decorated = self.linear.extra_repr, decorated
        self.outside = [nn.ReLU()]


@torch.no_grad()
def decorated() -> None:
    """Found under its name, in a wrapper of torch's."""


def pixart() -> nn.Module:
    return MODELS["pixart"].build()


def with_adapter() -> nn.Module:
    module = pixart()
    attention = module.get_submodule(BLOCK)
    attention.to_q = LowRank(attention.to_q)
    return module


def offloaded() -> nn.Module:
    module = pixart()
    add_hook_to_module(module, CpuOffload(CPU))
    add_hook_to_module(module.transformer_blocks[0], AlignDevicesHook(CPU, io_same_device=True))
    return module


def cast() -> nn.Module:
    module = pixart()
    module.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    return module


def grouped() -> nn.Module:
    module = pixart()
    apply_group_offloading(module, CPU, CPU, "block_level", num_blocks_per_group=1)
    return module


def parallelized() -> nn.Module:
    module = pixart()
    xdit_compile.parallelize(module, Plan(backend="eager"))
    return module


def processed() -> nn.Module:
    module = pixart()
    module.set_attn_processor(Scaled())
    return module


def seeded() -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(Table(), parametrizations.weight_norm(nn.Conv1d(2, 2, 1)))
    module.register_forward_pre_hook(noticed)
    return module


def noticed(module: nn.Module, args: Any) -> None:
    """A hook that is found under its name."""


MADE: dict[str, Callable[[], nn.Module]] = {
    made.__name__: made for made in (pixart, with_adapter, offloaded, cast, grouped, parallelized, processed, seeded)
} | {name: cases[name].build for cases, name in ((MODELS, "flux"), (MORE, "auraflow"), (MORE, "sd15")) if name in cases}


def keys() -> dict[str, str]:
    """The key of each module, and of the calls of some, in this process."""
    found = {name: digest_of(describe_module(make())) for name, make in MADE.items()}
    calls = {f"{name} called": digest_of(describe_call(*MODELS[name].inputs())) for name in ("pixart", "flux")}
    return {**found, **calls, "environment": digest_of(environment(CPU)), "sources": own_sources()}


def started(code: str, *path: Path, seed: int = 0) -> subprocess.Popen:
    """A process of its own that runs some code."""
    search = os.pathsep.join(map(str, [*path, ROOT, ROOT / "tests"]))
    own = {**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": search, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], env=own, text=True, stdout=subprocess.PIPE)


def told(process: subprocess.Popen) -> str:
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return out.strip().splitlines()[-1]


def test_keys_are_equal_in_other_processes() -> None:
    code = "import json; from tests.cache import test_key; print(json.dumps(test_key.keys()))"
    processes = [started(code, seed=seed) for seed in (1, 2)]
    one, other = (json.loads(told(process)) for process in processes)
    assert one == other
    assert len(set(one.values())) == len(one) - 1, "the parallelized module has the key of the plain one alone"
    assert one["parallelized"] == one["pixart"]


def attention_of(module: nn.Module) -> Any:
    return module.get_submodule(BLOCK)


def flag(module: nn.Module) -> None:
    module.register_to_config(norm_eps=1e-3)


def training(module: nn.Module) -> None:
    attention_of(module).train()


def processor(module: nn.Module) -> None:
    attention_of(module).set_processor(AttnProcessor())


def adapter_scale(module: nn.Module) -> None:
    attention_of(module).to_q.scaling["one"] = 0.75


def adapter_off(module: nn.Module) -> None:
    attention_of(module).to_q.disabled = True


def hook(module: nn.Module) -> None:
    attention_of(module).register_forward_pre_hook(noticed)


def hook_with_keywords(module: nn.Module) -> None:
    attention_of(module).register_forward_pre_hook(noticed, with_kwargs=True)


def library_hook(module: nn.Module) -> None:
    add_hook_to_module(attention_of(module), AlignDevicesHook(CPU))


def buffer_shape(module: nn.Module) -> None:
    module.pos_embed.pos_embed = module.pos_embed.pos_embed[:, :-1].clone()


def attribute_tensor(module: nn.Module) -> None:
    attention_of(module).table = torch.tensor([1.0, 2.5])


def attribute_array(module: nn.Module) -> None:
    attention_of(module).array = np.array([1.0, 3.0])


def one_weight_twice(module: nn.Module) -> None:
    attention_of(module).to_k.weight = attention_of(module).to_q.base_layer.weight


def dtype(module: nn.Module) -> None:
    attention_of(module).to_v.half()


def strided(module: nn.Module) -> None:
    linear = attention_of(module).to_v
    linear.weight = nn.Parameter(linear.weight.detach().t().contiguous().t(), requires_grad=False)


def forward_patched(module: nn.Module) -> None:
    attention_of(module).to_v.forward = torch.nn.functional.relu


def block_gone(module: nn.Module) -> None:
    del module.transformer_blocks[0]


def blocks_swapped(module: nn.Module) -> None:
    children = module.transformer_blocks._modules
    module.transformer_blocks._modules = dict(reversed(children.items()))


def module_shared_with_another(module: nn.Module) -> None:
    attention_of(module).to_v = module.transformer_blocks[0].attn1.to_v


def module_shared_with_a_third(module: nn.Module) -> None:
    attention_of(module).to_v = module.transformer_blocks[0].attn1.to_k


CHANGES = (
    flag, training, processor, adapter_scale, adapter_off, hook, hook_with_keywords, library_hook, buffer_shape,
    attribute_tensor, attribute_array, one_weight_twice, dtype, strided, forward_patched, block_gone, blocks_swapped,
    module_shared_with_another, module_shared_with_a_third,
)  # fmt: skip


@pytest.fixture(scope="module")
def adapted() -> Callable[[], nn.Module]:
    """Makes a module with an adapter, and with plain values on it."""

    def make() -> nn.Module:
        module = with_adapter()
        attention = attention_of(module)
        attention.table, attention.array = torch.tensor([1.0, 2.0]), np.array([1.0, 2.0])
        return module

    return make


def test_every_change_of_a_module_makes_another_key(adapted: Callable[[], nn.Module]) -> None:
    plain = digest_of(describe_module(adapted()))
    found = {"none": plain}
    for change in CHANGES:
        module = adapted()
        change(module)
        found[change.__name__] = digest_of(describe_module(module))
    assert len(set(found.values())) == len(found), collections.Counter(found.values()).most_common(2)
    assert digest_of(describe_module(adapted())) == plain


def test_a_class_whose_method_was_replaced_makes_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = describe_module(with_adapter())
    monkeypatch.setattr(LowRank, "forward", noticed)
    assert describe_module(with_adapter()) != before


def test_what_stands_in_the_place_of_methods_does_not_count() -> None:
    module = pixart()
    before = describe_module(module)
    put_in_place(module, {"forward": noticed, "fuse_qkv_projections": noticed})
    put_in_place(attention_of(module).to_v, {"forward": noticed})
    assert describe_module(module) == before
    put_back(attention_of(module).to_v)
    Refusals().put_on(release(module, BLOCK))
    after = describe_module(module)
    assert after["modules"].pop(BLOCK + ".to_v") != before["modules"].pop(BLOCK + ".to_v")
    assert after == before


def release(module: nn.Module, path: str) -> nn.Module:
    """Take the values of one weight out of a module, as ranks do which hold slices of it."""
    linear = module.get_submodule(path).to_v
    linear.weight = released(linear.weight, "weight")
    return module


def test_a_hook_around_all_modules_makes_another_key() -> None:
    module = pixart()
    before = describe_module(module)
    handle = nn.modules.module.register_module_forward_pre_hook(noticed)
    try:
        assert describe_module(module) != before
    finally:
        handle.remove()
    assert describe_module(module) == before


def test_what_decides_nothing_does_not_count() -> None:
    module = pixart()
    before = describe_module(module)
    module.register_to_config(_name_or_path="somewhere/else", _use_default_values=["b", "a"])
    add_hook_to_module(module, CpuOffload(CPU))
    with torch.no_grad():
        module.proj_out.weight.zero_()
    module.requires_grad_(True)
    assert describe_module(module) == before
    xdit_compile.parallelize(module, Plan(backend="eager"))
    args, kwargs = MODELS["pixart"].inputs()
    with torch.no_grad():
        module(*args, **kwargs)
    assert describe_module(module) == before


def test_every_change_of_a_call_makes_another_key() -> None:
    one, other = torch.zeros(2, 3), torch.ones(2, 3)
    calls: dict[str, tuple[tuple, dict[str, Any]]] = {
        "plain": ((one, [one]), {"scale": 1.0}),
        "shape": ((one[:1], [one]), {"scale": 1.0}),
        "dtype": ((one.half(), [one]), {"scale": 1.0}),
        "device": ((one.to("meta"), [one]), {"scale": 1.0}),
        "number": ((one, [one]), {"scale": 2.0}),
        "kind of number": ((one, [one]), {"scale": 1}),
        "truth": ((one, [one]), {"scale": True}),
        "container": ((one, (one,)), {"scale": 1.0}),
        "none": ((one, [None]), {"scale": 1.0}),
        "object": ((one, [one]), {"scale": Scaled()}),
    }
    found = {name: digest_of(describe_call(*call)) for name, call in calls.items()}
    args, kwargs = calls["plain"]
    with torch.autocast("cpu", torch.bfloat16):
        found["autocast"] = digest_of(describe_call(args, kwargs))
    with torch.inference_mode():
        found["inference mode"] = digest_of(describe_call(args, kwargs))
    with torch.no_grad():
        found["no grad"] = digest_of(describe_call(args, kwargs))
    assert len(set(found.values())) == len(found), found
    assert digest_of(describe_call((other, [other]), kwargs)) == found["plain"]


def closure(module: nn.Module) -> None:
    def inside(child: nn.Module, args: Any) -> None: ...

    attention_of(module).register_forward_pre_hook(inside)


def unnamed(module: nn.Module) -> None:
    attention_of(module).choose = {"by": [lambda x: x]}


def local_class(module: nn.Module) -> None:
    class Inside:
        pass

    attention_of(module).processor = Inside()


def local_module(module: nn.Module) -> None:
    class Inside(nn.Module):
        pass

    attention_of(module).to_v = Inside()


def replaced_name(module: nn.Module) -> None:
    function = types.FunctionType(noticed.__code__, globals(), "noticed")
    function.__qualname__, function.__module__ = "noticed", noticed.__module__
    attention_of(module).noticed = function


REFUSED: dict[Callable[[nn.Module], None], str] = {
    closure: rf"_forward_pre_hooks\[0\] of {BLOCK} is closure.<locals>.inside of .*made inside of another one",
    unnamed: rf"choose\['by'\]\[0\] of {BLOCK} is a lambda",
    local_class: rf"processor of {BLOCK} is a local_class.<locals>.Inside, a class that is not found",
    local_module: rf"the class of {BLOCK}.to_v is a local_module.<locals>.Inside, a class that is not found",
    replaced_name: rf"noticed of {BLOCK} is noticed, a function that is not found under that name",
    lambda module: setattr(attention_of(module), "lock", threading.Lock()): rf"lock of {BLOCK} is a _thread.lock",
    lambda module: setattr(attention_of(module), "file", sys.__stdout__): rf"file of {BLOCK} is a _io.TextIOWrapper",
    lambda module: setattr(attention_of(module), "steps", iter([1])): rf"steps of {BLOCK} is a builtins.list_iterator",
    lambda module: setattr(attention_of(module), "draws", torch.Generator()): "draws of .* is a random generator",
    lambda module: setattr(module, "far", weakref.ref(nn.ReLU)): "far of .* is a weak reference to a",
    lambda module: setattr(module, "walk", (each for each in ())): "walk of the module itself is a generator",
}


@pytest.mark.parametrize("put_on", REFUSED)
def test_what_another_process_cannot_find_is_refused_by_name(put_on: Callable[[nn.Module], None]) -> None:
    module = pixart()
    put_on(module)
    with pytest.raises(Unportable, match=REFUSED[put_on]):
        describe_module(module)


def test_a_chain_without_end_and_an_argument_are_refused_by_name() -> None:
    module, chain = nn.Linear(1, 1), []
    for _ in range(5000):
        chain = [chain]
    module.chain = chain
    with pytest.raises(Unportable, match="is nested too deeply"):
        describe_module(module)
    with pytest.raises(Unportable, match="input 1.* is a lambda"):
        describe_call((torch.ones(1), lambda: 0), {})


def test_circles_end() -> None:
    module, circle = nn.Linear(1, 1), {}
    circle["self"] = module.circle = [circle, module]
    assert describe_module(module) == describe_module(module)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a small package that can be imported: a module, and the numbers that it takes from another."""
    package = tmp_path / "keyed_project"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "numbers.py").write_text("SCALE = 2.0\n")
    (package / "unused.py").write_text("")
    model = """
        import torch
        from .numbers import SCALE

        class Scale(torch.nn.Module):
            def forward(self, x):
                return x * SCALE
    """
    (package / "model.py").write_text(textwrap.dedent(model))
    monkeypatch.syspath_prepend(tmp_path)
    yield package
    for name in [name for name in sys.modules if name.startswith("keyed_project")]:
        del sys.modules[name]


def test_files_that_ran_are_recorded_and_a_changed_one_is_noticed(project: Path) -> None:
    model = importlib.import_module("keyed_project.model").Scale()
    with recorded() as recording:
        model(torch.ones(2))
    assert recording.incomplete is None
    entries = manifest(recording.files)
    assert set(entries) == {"module:keyed_project.model", "module:keyed_project.numbers"}
    digests = Digests()
    assert fits(entries, digests) is None

    code = f"""
import json, sys
from xdit_compile.cache.sources import fits
before = set(sys.modules)
print(fits(json.loads('''{json.dumps(entries)}''')), sorted(name for name in set(sys.modules) - before))
"""
    assert told(started(code, project.parent)) == "None []"
    moved = project.parent / "elsewhere"
    moved.mkdir()
    project.rename(moved / project.name)
    assert told(started(code, moved)) == "None []"
    assert told(started(code)) == "keyed_project.model is not there []"
    (moved / project.name).rename(project)

    (project / "unused.py").write_text("CHANGED = 1\n")
    assert fits(entries, digests) is None
    (project / "numbers.py").write_text("SCALE = 3.0\n")
    assert fits(entries, digests) == f"{project / 'numbers.py'} was changed"


def test_code_that_is_older_than_its_file_is_noticed(project: Path) -> None:
    model = importlib.import_module("keyed_project.model").Scale()
    file = project / "model.py"
    file.write_text(file.read_text().replace("x * SCALE", "x + SCALE"))
    with recorded() as recording:
        model(torch.ones(2))
    assert recording.incomplete is not None
    assert "model.py was changed after it was imported" in recording.incomplete


def test_the_model_of_a_library_is_named_by_its_modules() -> None:
    module, (args, kwargs) = pixart(), MODELS["pixart"].inputs()
    with recorded() as recording, torch.no_grad():
        module(*args, **kwargs)
    names = {key.partition(":")[2] for key in manifest(recording.files)}
    assert "diffusers.models.transformers.pixart_transformer_2d" in names
    assert not [name for name in names if name.partition(".")[0] in ("torch", "numpy", "inspect", "xdit_compile")]


def test_another_profiler_goes_on_and_the_recording_says_so() -> None:
    events: list[str] = []

    def mine(*event: Any) -> None:
        events.append(event[1])

    sys.setprofile(mine)
    try:
        with recorded() as recording:
            noticed(nn.ReLU(), ())
        assert sys.getprofile() is mine
    finally:
        sys.setprofile(None)
    assert recording.incomplete == "another profiler was active"
    with recorded() as recording:
        sys.setprofile(mine)
    assert sys.getprofile() is mine
    sys.setprofile(None)
    assert recording.incomplete == "another profiler took over"
    assert "call" in events


def test_cells_of_notebooks_count_by_content_and_other_texts_are_refused() -> None:
    import linecache

    cell = "def double(x):\n    return 2 * x\n"
    linecache.cache["<cell 3>"] = (len(cell), None, cell.splitlines(True), "<cell 3>")
    try:
        names: dict[str, Any] = {}
        exec(compile(cell, "<cell 3>", "exec"), names)
        with recorded() as recording:
            names["double"](1)
        entries = manifest(recording.files)
        assert [key.partition(":")[0] for key in entries] == ["cell"]
        assert fits(entries) is None
    finally:
        del linecache.cache["<cell 3>"]
    assert fits(entries) == "a cell of a notebook was changed, or did not run yet"
    with pytest.raises(Unportable, match="code of <cell 3> ran"):
        manifest(recording.files)
    assert manifest(["<frozen importlib._bootstrap>", "<eval_with_key>.7", torch.__file__, os.__file__]) == {}


def test_own_sources_reach_through_the_links(tmp_path: Path) -> None:
    package, linked = tmp_path / "package", tmp_path / "linked"
    package.mkdir()
    linked.mkdir()
    (package / "one.py").write_text("1")
    (linked / "two.py").write_text("2")
    (package / "linked").symlink_to(linked)
    before = own_sources(package)
    (linked / "notes.txt").write_text("nothing")
    assert own_sources(package) == before
    (linked / "two.py").write_text("3")
    assert own_sources(package) != before


def test_what_is_set_makes_another_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    variables = {"PATH": os.environ["PATH"]}
    plain = environment(CPU, variables)
    assert plain["compiler"] and plain["processor"]["abilities"]
    apart = {"TORCHINDUCTOR_CACHE_DIR": "/a", "XDIT_COMPILE_DUMP": "/b", "TORCH_LOGS": "+all", "HOME": "/c"}
    assert environment(CPU, {**variables, **apart}) == plain
    came_along = {"TRITON_PTXAS_PATH": f"{os.path.dirname(torch.__file__)}/bin/ptxas", "TORCH_WARM_POOL": "0"}
    assert environment(CPU, {**variables, **came_along}) == plain
    assert environment(CPU, {**variables, "TRITON_PTXAS_PATH": "/opt/cuda/bin/ptxas"}) != plain
    with monkeypatch.context() as patched:
        patched.setattr("torch.utils.cpp_extension.CUDA_HOME", "/opt/cuda")
        set_by_inductor = {"TRITON_LIBDEVICE_PATH": "/opt/cuda/nvvm/libdevice/libdevice.10.bc"}
        assert environment(CPU, {**variables, **set_by_inductor}) == plain
        assert environment(CPU, {**variables, "TRITON_LIBDEVICE_PATH": "/another.bc"}) != plain
    assert environment(CPU, {**variables, "TORCHINDUCTOR_FREEZING": "1"}) != plain
    with config.patch(epilogue_fusion=not config.epilogue_fusion):
        assert environment(CPU, variables) != plain
    with config.patch(compile_threads=7):
        assert environment(CPU, variables) == plain
    with config.patch(post_grad_custom_pre_pass=lambda graph: None), pytest.raises(Unportable, match="custom_pre_pass"):
        environment(CPU, variables)
    with monkeypatch.context() as patched:
        patched.setattr(environments, "_version", lambda name: "0")
        assert environment(CPU, variables) != plain
    with torch.backends.cudnn.flags(deterministic=True):
        assert environment(CPU, variables) != plain
    with monkeypatch.context() as patched:
        patched.setattr(torch, "get_num_threads", lambda: 99)
        assert environment(CPU, variables) != plain
    assert environment(CPU, variables) == plain


def test_a_value_alone_is_described() -> None:
    assert describe_value({"a": (1, 2.0)}, "it") == {"dict": [["a", {"tuple": [1, {"float": "2.0"}]}]]}
    assert accelerate.__version__ in json.dumps(environment(CPU))


def test_adapters_of_peft() -> None:
    peft = pytest.importorskip("peft")
    module = MODELS["flux"].build()
    keys = [digest_of(describe_module(module))]
    module.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "proj_out"]), "one")
    keys.append(digest_of(describe_module(module)))
    module.set_adapters(["one"], [0.3])
    keys.append(digest_of(describe_module(module)))
    module.disable_adapters()
    keys.append(digest_of(describe_module(module)))
    assert len(set(keys)) == 4
