"""Each rank holds its slices of the weights alone: cut from a loaded module, or read from a checkpoint's files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import procs
import pytest
import torch
from commands import TINY_PIPELINE
from safetensors.torch import load_file, save_file
from splitting import captured, partition_all, worst_difference
from torch import nn
from torch.utils import _pytree as pytree
from zoo import transformers as zoo

import xdit_compile
from xdit_compile.api import runner_of
from xdit_compile.distributed.mesh import Mesh
from xdit_compile.errors import UsageError
from xdit_compile.ir.program import Input, WeightSlice
from xdit_compile.plan import Plan
from xdit_compile.weights.checkpoint import Checkpoint
from xdit_compile.weights.weights import Weights, cut, place

PIECES = (WeightSlice(1, ((0, 2), (5, 6))), WeightSlice(0, ((1, 3),)))


def present(module: nn.Module) -> int:
    """Elements of the parameters that a module holds."""
    return sum(parameter.numel() for parameter in module.parameters() if not parameter.is_meta)


def test_pieces_are_cut_and_placed_where_they_were() -> None:
    whole = torch.arange(28.0).reshape(4, 7)
    value = cut(whole, PIECES)
    assert torch.equal(value, whole[1:3][:, [0, 1, 5]]) and value.is_contiguous()
    empty = torch.zeros_like(whole)
    place(empty, PIECES, value)
    assert torch.equal(empty[1:3][:, [0, 1, 5]], value) and empty.count_nonzero() == value.numel()


def test_a_slice_follows_its_parameter() -> None:
    module = nn.Linear(7, 4)
    weights, given = Weights(module), Input("w", "parameter", "weight", PIECES)
    first = weights.find(given)
    assert weights.find(given) is first
    with torch.no_grad():
        module.weight.add_(1)
    assert torch.equal(weights.find(given), first + 1)
    module.weight = nn.Parameter(torch.zeros(4, 7))
    assert not weights.find(given).any()


def test_every_rank_together_holds_every_weight_once() -> None:
    model = captured("flux")
    ranks = partition_all(model.inference, Plan(tensor=3))
    for rank in ranks:
        assert all(given.kind == "parameter" for given in rank.program.inputs if given.pieces)
    by_name = [{str(given.target): given for given in rank.program.inputs} for rank in ranks]
    for name, parameter in model.module.named_parameters():
        if not by_name[0][name].pieces:
            continue
        counts = torch.zeros_like(parameter)
        for inputs in by_name:
            ones = torch.zeros_like(parameter)
            place(ones, inputs[name].pieces, torch.ones_like(cut(parameter, inputs[name].pieces)))
            counts += ones
        assert (counts == 1).all(), name


def run_released(rank: int, name: str, plan: Plan) -> tuple[float, float, bool, bool]:
    """Worst difference, share of the weights kept, and whether restoring gave every weight back."""
    case = zoo.MODELS[name]
    module = case.build()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    args, kwargs = case.inputs()
    with torch.no_grad():
        expected = pytree.tree_leaves(module(*args, **kwargs))
    xdit_compile.parallelize(module, plan)
    worst = max(worst_difference(module(*args, **kwargs), expected) for _ in range(2))
    runner = runner_of(module)
    captures = len(runner.calls)
    share = runner.weights.elements / sum(parameter.numel() for parameter in module.parameters())
    xdit_compile.restore(module)
    after = module.state_dict()
    same = all(torch.equal(value, after[key]) for key, value in before.items())
    with torch.no_grad():
        same = same and worst_difference(module(*args, **kwargs), expected) == 0
    return worst, share, same, captures == 1


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("flux", Plan(tensor=2, backend="eager")),
        ("wan_t2v", Plan(tensor=2, ulysses=2, backend="eager")),
        pytest.param("flux", Plan(pipefusion=2, backend="eager"), marks=pytest.mark.slow),
        pytest.param("flux", Plan(pipefusion=2, tensor=2, backend="eager"), marks=pytest.mark.slow),
    ],
    ids=["flux", "wan", "stages", "stages and slices"],
)
def test_ranks_release_what_they_do_not_need_and_restore_gathers_it(name: str, plan: Plan) -> None:
    for worst, share, same, captured_once in procs.run(run_released, plan.world_size, name, plan):
        assert worst <= 2e-5 and same and captured_once
        assert share < 0.65


def run_other_size(rank: int) -> tuple[float, int]:
    case = zoo.MODELS["pixart"]
    module = case.build()
    plan = Plan(tensor=2, backend="eager")
    args, kwargs = case.inputs()
    calls = [args, (args[0][..., : args[0].shape[-1] // 2], *args[1:])]
    with torch.no_grad():
        expected = [pytree.tree_leaves(module(*given, **kwargs)) for given in calls]
    xdit_compile.parallelize(module, plan)
    found = [module(*given, **kwargs) for given in (*calls, calls[0])]
    worst = max(worst_difference(one, other) for one, other in zip(found, [*expected, expected[0]], strict=True))
    return worst, len(runner_of(module).calls)


def test_another_size_is_captured_without_the_weights_that_were_released() -> None:
    for worst, signatures in procs.run(run_other_size, 2):
        assert worst <= 2e-5 and signatures == 2


def run_keeping(rank: int) -> bool:
    case = zoo.MODELS["pixart"]
    module = case.build()
    args, kwargs = case.inputs()
    xdit_compile.parallelize(module, Plan(tensor=2, backend="eager", keep_weights=True))
    module(*args, **kwargs)
    return any(parameter.is_meta for parameter in module.parameters())


def test_weights_are_kept_when_asked() -> None:
    assert procs.run(run_keeping, 2) == [False, False]


def picture(pipe: object) -> torch.Tensor:
    return pipe(  # type: ignore[operator]
        "a red circle",
        num_inference_steps=2,
        height=64,
        width=64,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images


def run_loaded(rank: int, folder: str, plan: Plan) -> tuple[torch.Tensor, float, torch.Tensor]:
    pipe = xdit_compile.from_pretrained(folder, plan, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    before = present(pipe.transformer)
    made = picture(pipe)
    total = sum(parameter.numel() for parameter in pipe.transformer.parameters())
    held = runner_of(pipe.transformer).weights.elements
    assert before < 0.2 * total
    xdit_compile.restore(pipe)
    return made, held / total, picture(pipe)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY_PIPELINE, tmp_path / "pipeline"))


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "several files"])
def test_every_rank_reads_its_slices_of_a_checkpoint(folder: Path, sharded: bool) -> None:
    from diffusers import DiffusionPipeline

    whole = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    whole.set_progress_bar_config(disable=True)
    expected = picture(whole)
    if sharded:
        shutil.rmtree(folder / "transformer")
        whole.transformer.save_pretrained(folder / "transformer", max_shard_size="40KB")
        assert len(list((folder / "transformer").glob("*.safetensors"))) > 1
    for made, share, restored in procs.run(run_loaded, 2, str(folder), Plan(tensor=2, backend="eager")):
        assert worst_difference(made, [expected]) <= 2e-5
        assert torch.equal(restored, expected)
        assert share < 0.75


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_empty_module_has_the_dtypes_that_diffusers_gives(folder: Path, dtype: torch.dtype) -> None:
    from diffusers import DiffusionPipeline

    ours = xdit_compile.from_pretrained(folder, torch_dtype=dtype).transformer
    theirs = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype).transformer
    for one, other in (
        (ours.named_parameters(), theirs.named_parameters()),
        (ours.named_buffers(), theirs.named_buffers()),
    ):
        assert {name: (value.shape, value.dtype) for name, value in one} == {
            name: (value.shape, value.dtype) for name, value in other
        }
    assert all(torch.equal(value, dict(theirs.named_buffers())[name]) for name, value in ours.named_buffers())


def weights_file(folder: Path) -> Path:
    return folder / "transformer" / "diffusion_pytorch_model.safetensors"


def cut_short(folder: Path) -> None:
    file = weights_file(folder)
    file.write_bytes(file.read_bytes()[:-1000])


def lose_a_tensor(folder: Path) -> None:
    tensors = load_file(weights_file(folder))
    tensors.pop("proj_out.bias")
    save_file(tensors, weights_file(folder))


def change_a_shape(folder: Path) -> None:
    tensors = load_file(weights_file(folder))
    tensors["proj_out.bias"] = torch.zeros(3)
    save_file(tensors, weights_file(folder))


def lose_a_shard(folder: Path) -> None:
    index = {"weight_map": {"proj_out.bias": "diffusion_pytorch_model-00002-of-00002.safetensors"}}
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def no_safetensors(folder: Path) -> None:
    weights_file(folder).rename(folder / "transformer" / "diffusion_pytorch_model.bin")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut_short, "damaged or cut short"),
        (lose_a_tensor, "lacks the weights of proj_out.bias"),
        (change_a_shape, r"proj_out.bias is \(3,\) instead of"),
        (lose_a_shard, "lacks diffusion_pytorch_model-00002-of-00002.safetensors of 1 shards"),
        (no_safetensors, "has no diffusion_pytorch_model.safetensors"),
    ],
)
def test_a_spoilt_checkpoint_is_refused_before_anything_is_loaded(folder: Path, spoil: object, message: str) -> None:
    spoil(folder)  # type: ignore[operator]
    with pytest.raises(UsageError, match=message):
        xdit_compile.from_pretrained(folder)


def test_arguments_that_place_weights_are_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="device_map cannot go together"):
        xdit_compile.from_pretrained(folder, device_map="balanced")
    with pytest.raises(UsageError, match="is no pipeline"):
        xdit_compile.from_pretrained(folder / "transformer")


def test_a_checkpoint_reads_pieces(folder: Path) -> None:
    checkpoint = Checkpoint(folder / "transformer")
    linears = {name: value for name, value in load_file(weights_file(folder)).items() if value.dim() == 2}
    name, whole = max(linears.items(), key=lambda item: item[1].numel())
    pieces = (WeightSlice(1, ((0, 2), (3, 4))), WeightSlice(0, ((1, 3),)))
    assert torch.equal(checkpoint.read(name, pieces), cut(whole, pieces))
    assert torch.equal(checkpoint.read(name), whole)


def test_a_mesh_of_one_rank_takes_whole_weights() -> None:
    model = captured("pixart")
    (rank,) = partition_all(model.inference, Plan())
    assert not any(given.pieces for given in rank.program.inputs)
    assert Mesh.simulated(Plan(), 0).world_size == 1
