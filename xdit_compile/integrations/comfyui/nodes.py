"""The nodes: what they take, and what they do with a server."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from . import host
from .client import Client
from .form import Input, Node, Output
from .pictures import batch_of, file_of, latents_file, latents_of, picture_of, size_for
from .server import KEY, Servers, Settings

ADDRESS = "XDIT_COMPILE_ADDRESS"
PIPELINE = "XDIT_PIPELINE"
ASKED = "xdit_compile"
"""Where a ``LATENT`` says what it was made with."""
SIDE, COUNT, MOST_SEED = 16384, 64, 2**53 - 1
STEPS = 20
"""Steps that previews are spread over where neither the user nor the server says how many there are."""
PREVIEWS = 100
"""The most that a server sends of one request."""


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """What ``XDIT_PIPELINE`` is: a way to a server that takes requests, started where it has to be."""

    client: Callable[[], Client]


def nodes_of(servers: Servers) -> list[Node]:
    """All nodes.

    Args:
        servers: where they start theirs.
    """
    pipeline = Output(PIPELINE, "pipeline", "To be connected with the nodes that make pictures.")
    images = Output("IMAGE", "images", "The pictures.")
    latent = Output("LATENT", "latent", "For Decode alone; its shape is the pipeline's own.")
    return [
        Node(
            "XditCompileLoadPipeline", "Load Pipeline (xdit-compile)",
            "Loads a diffusers pipeline on several devices, in processes beside ComfyUI. They stay until another plan "
            "or model is loaded, or ComfyUI ends.",
            LOAD, [pipeline], lambda **inputs: load(servers, **inputs), stamp_of,
        ),
        Node(
            "XditCompileConnect", "Connect to Server (xdit-compile)",
            "Uses a server that runs: xdit-compile serve, on this machine or another.",
            CONNECT, [pipeline], connect,
        ),
        Node(
            "XditCompileGenerate", "Generate (xdit-compile)",
            "Makes pictures: from a text, and from a picture, a mask or a control picture if the pipeline takes them.",
            MAKE, [images], generate,
        ),
        Node(
            "XditCompileSample", "Sample (xdit-compile)",
            "The same as Generate, but ends before the pictures are decoded.",
            MAKE, [latent], sample,
        ),
        Node(
            "XditCompileDecode", "Decode (xdit-compile)", "Makes the pictures of what Sample gave.",
            DECODE, [images], decode,
        ),
    ]  # fmt: skip


LOAD = (
    Input("model", "STRING", "Folder of a pipeline in diffusers' format, its name in models/diffusers, or its id on "
          "the Hub. Empty for the embedded one, which draws shapes.", {"default": ""}),
    Input("processes", "INT", "How many share the work; with GPUs, one on each.",
          {"default": 1, "min": 1, "max": 1024}),
    Input("plan", "STRING", "How they share it, such as: ulysses_degree=2, use_parallel_vae. Any flags of xdit-compile "
          "serve. Empty lets it choose.", {"default": "", "multiline": True}),
    Input("dtype", "COMBO", "Of the weights; auto is bfloat16 on CUDA.",
          {"options": ["auto", "float32", "bfloat16", "float16"], "default": "auto"}),
    Input("backend", "COMBO", "What runs the graphs; auto compiles where that is possible.",
          {"options": ["auto", "inductor", "nexfort", "eager", "aot_eager"], "default": "auto"}),
    Input("flags", "STRING", "More flags of xdit-compile serve, as on the command line: --enable_tiling --max_batch 1",
          {"default": "", "multiline": True}, optional=True),
)  # fmt: skip
CONNECT = (
    Input("address", "STRING", "Of the server. Empty takes XDIT_COMPILE_ADDRESS and XDIT_COMPILE_API_KEY of ComfyUI's "
          "environment.", {"default": "http://127.0.0.1:8000"}),
    Input("key", "STRING", "That the server asks for. It is saved with the workflow and in pictures: better leave "
          "address and key empty, and set the environment.", {"default": ""}, optional=True),
)  # fmt: skip
MAKE = (
    Input("pipeline", PIPELINE, "From Load Pipeline or Connect to Server."),
    Input("prompt", "STRING", "What is to be seen.", {"multiline": True, "dynamic_prompts": True, "default": ""}),
    Input("negative_prompt", "STRING", "What is not to be seen; empty for none.",
          {"multiline": True, "dynamic_prompts": True, "default": ""}),
    Input("width", "INT", "Pixels; 0 for that of the picture that is given, or the pipeline's own.",
          {"default": 0, "min": 0, "max": SIDE, "step": 8}),
    Input("height", "INT", "Pixels; 0 as for width.", {"default": 0, "min": 0, "max": SIDE, "step": 8}),
    Input("steps", "INT", "Of the scheduler; 0 for the pipeline's own.", {"default": 0, "min": 0, "max": 1000}),
    Input("guidance", "FLOAT", "How closely the prompt is followed; -1 for the pipeline's own.",
          {"default": -1.0, "min": -1.0, "max": 100.0, "step": 0.1}),
    Input("seed", "INT", "Of the first picture; the others follow by one.",
          {"default": 0, "min": 0, "max": MOST_SEED, "control_after_generate": True}),
    Input("count", "INT", "How many pictures.", {"default": 1, "min": 1, "max": COUNT}),
    Input("preview_every", "INT", "Steps between two previews at most; each is decoded as the last picture is, which "
          "takes its time. 0 for none.", {"default": 0, "min": 0, "max": 1000}),
    Input("image", "IMAGE", "To begin from, for pipelines that take one.", optional=True),
    Input("strength", "FLOAT", "How much of it is made anew; -1 for the pipeline's own.",
          {"default": -1.0, "min": -1.0, "max": 1.0, "step": 0.01}, optional=True),
    Input("mask", "MASK", "Where it is made anew, for pipelines that take a mask.", optional=True),
    Input("control_image", "IMAGE", "That leads the drawing, such as edges or depths, for pipelines that take one.",
          optional=True),
    Input("arguments", "STRING", 'More arguments of the pipeline\'s call, as JSON: {"eta": 0.5}',
          {"default": "", "multiline": True}, optional=True),
)  # fmt: skip
DECODE = (
    Input("pipeline", PIPELINE, "The same as for Sample."),
    Input("latent", "LATENT", "From Sample."),
)


def load(servers: Servers, flags: str = "", **inputs: Any) -> tuple[Pipeline]:
    """Have a server of these settings run.

    Raises:
        ValueError, RuntimeError: as `Servers.ready`.
    """
    inputs["model"] = host.folder_of(inputs["model"].strip())
    settings = Settings(**inputs, flags=flags, stamp=stamp_of(**inputs))

    def client() -> Client:
        return servers.ready(settings, host.look, host.say, host.make_room)

    client()
    return (Pipeline(client),)


def stamp_of(model: str = "", **_: Any) -> float:
    """When a pipeline's folder was last written to, in seconds; 0 for what is no folder."""
    folder = Path(host.folder_of(model.strip()))
    if not model.strip() or not (folder / "model_index.json").is_file():
        return 0.0
    with contextlib.suppress(OSError):
        return max(path.stat().st_mtime for path in folder.rglob("*"))
    return 0.0


def connect(address: str = "", key: str = "") -> tuple[Pipeline]:
    """See that a server answers.

    Raises:
        ValueError: there is no address, or none that can be one.
        Refused, Lost: as `Client.facts`.
    """
    address, key = address.strip(), key.strip()
    if not address:
        address, key = os.environ.get(ADDRESS, ""), key or os.environ.get(KEY, "")
        if not address:
            raise ValueError(f"address is empty, and {ADDRESS} is not set where ComfyUI was started")
    client = Client(address, key or None)
    client.facts()
    return (Pipeline(lambda: client),)


def generate(**inputs: Any) -> tuple[Any]:
    """An ``IMAGE``, float32 ``[N, H, W, C]``.

    Raises:
        ValueError: inputs are wrong.
        RuntimeError: the server refuses the request, or is gone.
    """
    client = inputs.pop("pipeline").client()
    fields, files = asked_of(client, **inputs)
    (event,) = _made(client, {**fields, "response_format": "pixels"}, files)
    return (batch_of(event["b64_pixels"]),)


def sample(**inputs: Any) -> tuple[dict[str, Any]]:
    """A ``LATENT`` that remembers what it was made with.

    Raises:
        ValueError, RuntimeError: as `generate`.
    """
    client = inputs.pop("pipeline").client()
    fields, files = asked_of(client, **inputs)
    (event,) = _made(client, {**fields, "response_format": "latents"}, files)
    return ({"samples": latents_of(event["b64_latents"]), ASKED: {"fields": fields, "files": files}},)


def decode(pipeline: Pipeline, latent: Mapping[str, Any]) -> tuple[Any]:
    """The ``IMAGE`` of a ``LATENT`` of `sample`.

    Raises:
        ValueError: it is from another node.
        RuntimeError: the server refuses the request, or is gone.
    """
    if ASKED not in latent:
        raise ValueError("this latent is from another node; Decode takes what Sample (xdit-compile) gives")
    asked = latent[ASKED]
    files = {**asked["files"], "latents": latents_file(latent["samples"])}
    fields = {name: value for name, value in asked["fields"].items() if name not in ("stream", "partial_images")}
    fields = {**fields, "response_format": "pixels"}
    with contextlib.closing(pipeline.client().follow("/v1/images/decode", fields, files, host.look)) as events:
        (answer,) = events
    return (batch_of(answer["data"][0]["b64_pixels"]),)


def asked_of(
    client: Client, prompt: str, negative_prompt: str, width: int, height: int, steps: int, guidance: float, seed: int,
    count: int, preview_every: int, image: Any = None, strength: float = -1.0, mask: Any = None,
    control_image: Any = None, arguments: str = "",
) -> tuple[dict[str, Any], dict[str, bytes]]:  # fmt: skip
    """A request's fields, and its pictures as files.

    Raises:
        ValueError: a picture has the wrong size or is several, or the arguments are no JSON.
        Refused, Lost: as `Client.facts`.
    """
    more = _arguments(arguments)
    facts = client.facts()
    pictures = {"image": image, "mask": mask, "control_image": control_image}
    pictures = {name: picture for name, picture in pictures.items() if picture is not None}
    size = size_for((width, height), pictures, facts)
    steps_known = steps or facts.get("steps") or STEPS
    previews = min(PREVIEWS, math.ceil(steps_known / preview_every) - 1) if preview_every else 0
    fields = {
        "prompt": prompt, "negative_prompt": negative_prompt or None, "num_inference_steps": steps or None,
        "size": f"{size[0]}x{size[1]}" if size else None, "guidance_scale": guidance if guidance >= 0 else None,
        "strength": strength if strength >= 0 and image is not None else None, "seed": seed, "n": count,
        "arguments": more or None, "stream": True, "partial_images": previews,
    }  # fmt: skip
    if "control_image" in pictures and "control_image" not in facts.get("takes", ()) and image is None:
        pictures["image"] = pictures.pop("control_image")
    return fields, {name: file_of(name, picture) for name, picture in pictures.items()}


def _arguments(text: str) -> dict[str, Any]:
    try:
        arguments = json.loads(text) if text.strip() else {}
    except ValueError as error:
        raise ValueError(f"arguments are no JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise ValueError('arguments are no JSON object; write them as {"NAME": VALUE}')
    return arguments


def _made(client: Client, fields: dict[str, Any], files: dict[str, bytes]) -> list[dict[str, Any]]:
    """The last events of a request, while ComfyUI's bar shows how far it is."""
    bar, made = host.Bar(), []
    path = "/v1/images/edits" if files else "/v1/images/generations"
    with contextlib.closing(client.follow(path, fields, files, host.look)) as events:
        for event in events:
            kind = event["type"].rpartition(".")[2]
            if kind == "completed":
                made.append(event)
            elif kind == "progress":
                bar.show(event["step"], event["steps"])
            elif kind == "partial_image" and event.get("index", 0) == 0:
                bar.show(event["step"], event["steps"], picture_of(event["b64_json"]))
            elif kind == "retried":
                host.say("a process was lost; the request begins again")
    return made
