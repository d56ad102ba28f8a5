"""The fields of requests: OpenAI's, and ours beside them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

Size = Annotated[str, Field(pattern=r"^(auto|[0-9]{1,6}x[0-9]{1,6})$", description="WIDTHxHEIGHT, or auto")]
Unused = Annotated[Any, Field(description="read for OpenAI's clients, and not used")]


class Asked(BaseModel):
    """What all requests have."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    prompt: str = Field(description="what is to be seen")
    model: str | None = Field(None, description="as /v1/models names it; may be left out")
    size: Size | None = None
    height: int | None = Field(None, ge=1, description="pixels; beside width, in place of size")
    width: int | None = Field(None, ge=1)
    negative_prompt: str | None = Field(None, description="what is not to be seen")
    num_inference_steps: int | None = Field(None, ge=1, description="steps of the scheduler")
    guidance_scale: FiniteFloat | None = None
    max_sequence_length: int | None = Field(None, ge=1, description="tokens of a prompt")
    strength: FiniteFloat | None = Field(None, ge=0, le=1, description="how much of a picture is made anew")
    seed: int | None = Field(None, ge=0, lt=2**53, description="of the first picture; random where null")
    arguments: dict[str, Any] = Field(default_factory=dict, description="further arguments of the pipeline's call")
    priority: int = Field(0, ge=-100, le=100, description="those of a higher one begin first")
    deadline: FiniteFloat | None = Field(None, gt=0, description="seconds after which the request is given up with 504")
    user: Unused = None
    safety_identifier: Unused = None


class ImageRequest(Asked):
    """The body of /v1/images/generations."""

    n: int | None = Field(1, ge=1, description="how many pictures")
    output_format: Literal["png", "jpeg", "webp"] | None = "png"
    output_compression: int | None = Field(None, ge=0, le=100, description="quality of jpeg and webp; 100 is best")
    response_format: Literal["b64_json", "url", "pixels", "latents"] | None = Field(
        "b64_json",
        description="pixels: one uint8 tensor [N, H, W, C] as a safetensors file, in base64; latents: the same of what "
        "the pipeline would decode, for /v1/images/decode",
    )
    stream: bool | None = Field(False, description="answer as server-sent events, with one for each step")
    partial_images: int | None = Field(0, ge=0, le=100, description="pictures before the last that a stream has")
    background: Literal["auto", "opaque"] | None = None
    quality: Unused = None
    style: Unused = None
    moderation: Unused = None
    complexity: Unused = None
    input_fidelity: Unused = None


class DecodeRequest(ImageRequest):
    """The fields of /v1/images/decode: those of the request that made the latents."""

    response_format: Literal["b64_json", "url", "pixels"] | None = "b64_json"


class VideoRequest(Asked):
    """The body of /v1/videos, but for the picture that it may start from."""

    seconds: Annotated[str, Field(pattern=r"^[0-9]{1,4}(\.[0-9]{1,3})?$")] | None = Field(
        None, description="how long it is; or say num_frames"
    )
    num_frames: int | None = Field(None, ge=1)
    fps: int = Field(8, ge=1, le=120, description="frames per second of the file")
