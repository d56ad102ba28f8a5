"""Classes of diffusers that have no case, by the reason why."""

from __future__ import annotations

PIPELINES: dict[str, tuple[str, ...]] = {
    "the base of all": ("DiffusionPipeline",),
    "runs ONNX, no PyTorch": (
        "OnnxStableDiffusionImg2ImgPipeline", "OnnxStableDiffusionInpaintPipeline",
        "OnnxStableDiffusionInpaintPipelineLegacy", "OnnxStableDiffusionPipeline",
        "OnnxStableDiffusionUpscalePipeline", "StableDiffusionOnnxPipeline",
    ),
    "runs several pipelines that are here by themselves": (
        "KandinskyCombinedPipeline", "KandinskyImg2ImgCombinedPipeline", "KandinskyInpaintCombinedPipeline",
        "KandinskyV22CombinedPipeline", "KandinskyV22Img2ImgCombinedPipeline", "KandinskyV22InpaintCombinedPipeline",
        "StableCascadeCombinedPipeline", "VisualClozePipeline", "WuerstchenCombinedPipeline",
    ),
    "has no denoiser that iterates": (
        "FluxPriorReduxPipeline", "LTX2LatentUpsamplePipeline", "LTX2VideoDiffusionDecodePipeline",
        "LTXLatentUpsamplePipeline",
    ),
    "writes text": ("DiffusionGemmaPipeline", "LLaDA2Pipeline"),
    "not tried: makes meshes or proteins": (
        "RFD4ProteinaPipeline", "ShapEImg2ImgPipeline", "ShapEPipeline",
    ),
    "not tried: diffusers asks for packages here that are not required (torchvision, cv2, note-seq, a guard)": (
        "ConsisIDPipeline", "Cosmos2VideoToWorldPipeline", "Cosmos2_5_PredictBasePipeline",
        "Cosmos2_5_TransferPipeline", "CosmosVideoToWorldPipeline", "SpectrogramDiffusionPipeline",
    ),
    "fails unsplit with diffusers 0.42.1, by its default call with embeddings": (
        "ChromaInpaintPipeline", "EasyAnimateControlPipeline", "KolorsImg2ImgPipeline", "LongCatImagePipeline",
    ),
    "gives no finite numbers with random weights": ("CycleDiffusionPipeline",),
    "not tried: takes gradients of its denoiser": (
        "StableDiffusionAttendAndExcitePipeline", "StableDiffusionPix2PixZeroPipeline",
    ),
    "not tried: changes weights, and makes pictures as `StableDiffusionPipeline` does": (
        "StableDiffusionModelEditingPipeline",
    ),
    "not tried: inverts a picture first, in a call of its own": (
        "LEditsPPPipelineStableDiffusion", "LEditsPPPipelineStableDiffusionXL", "StableDiffusionDiffEditPipeline",
    ),
    "not tried: needs encoders, connectors or processors beside its denoiser, which is here": (
        "AceStepPipeline", "BriaFibo2Pipeline", "BriaFiboEditPipeline", "BriaFiboPipeline", "Cosmos3OmniPipeline",
        "DreamLiteMobilePipeline", "DreamLitePipeline", "Flux2KleinKVPipeline", "Ideogram4Pipeline",
        "JoyImageEditPipeline", "JoyImageEditPlusPipeline", "LongCatAudioDiTPipeline", "LongCatImageEditPipeline",
        "LTX2ConditionPipeline", "LTX2DFRPipeline", "LTX2DFRTemporalRefinePipeline", "LTX2HDRPipeline",
        "LTX2ImageToVideoPipeline", "LTX2InContextPipeline", "LTX2Pipeline", "OmniGenPipeline",
        "QwenImage21Pipeline", "QwenImageEditInpaintPipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline",
        "QwenImageLayeredPipeline", "SanaWMLTX2Refiner", "SanaWMPipeline", "StableAudio3AudioToAudioPipeline",
        "StableAudio3InpaintPipeline", "StableAudio3Pipeline", "Kandinsky6TI2VAPipeline", "WanAnimatePipeline",
        "HunyuanVideoImageToVideoPipeline", "VisualClozeGenerationPipeline", "ZImageOmniPipeline",
    ),
    "not tried: its denoiser is here": (
        "AnyFlowFARPipeline", "HeliosPipeline", "HeliosPyramidPipeline", "HunyuanImageRefinerPipeline",
        "HunyuanVideoFramepackPipeline", "Kandinsky6SRPipeline", "LTXI2VLongMultiPromptPipeline",
    ),
    "not tried: an older class with encoders of its own": (
        "AltDiffusionImg2ImgPipeline", "AltDiffusionPipeline", "AudioDiffusionPipeline", "AudioLDM2Pipeline",
        "AudioLDMPipeline", "BlipDiffusionControlNetPipeline", "BlipDiffusionPipeline", "KandinskyImg2ImgPipeline",
        "KandinskyInpaintPipeline", "KandinskyPipeline", "KandinskyPriorPipeline", "LDMTextToImagePipeline",
        "MusicLDMPipeline", "PaintByExamplePipeline", "SemanticStableDiffusionPipeline",
        "StableDiffusionGLIGENTextImagePipeline", "StableDiffusionLatentUpscalePipeline", "StableUnCLIPImg2ImgPipeline",
        "StableUnCLIPPipeline", "UnCLIPImageVariationPipeline", "UnCLIPPipeline", "UniDiffuserPipeline",
        "VQDiffusionPipeline", "VersatileDiffusionDualGuidedPipeline", "VersatileDiffusionImageVariationPipeline",
        "VersatileDiffusionPipeline", "VersatileDiffusionTextToImagePipeline",
    ),
    "not tried: its denoiser is here, and what it adds is here in other pipelines": (
        "AnimateDiffPAGPipeline", "AnimateDiffVideoToVideoControlNetPipeline", "Flux2KleinInpaintPipeline",
        "HunyuanVideo15ImageToVideoPipeline", "IFInpaintingSuperResolutionPipeline", "Kandinsky5I2IPipeline",
        "Kandinsky5I2VPipeline", "KandinskyV22ControlnetImg2ImgPipeline", "MotifVideoImage2VideoPipeline",
        "SkyReelsV2DiffusionForcingImageToVideoPipeline", "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
        "StableDiffusion3PAGImg2ImgPipeline", "StableDiffusionControlNetPAGInpaintPipeline",
        "StableDiffusionControlNetPAGPipeline", "StableDiffusionControlNetXSPipeline",
        "StableDiffusionPAGImg2ImgPipeline", "StableDiffusionPAGInpaintPipeline",
        "StableDiffusionXLControlNetImg2ImgPipeline", "StableDiffusionXLControlNetInpaintPipeline",
        "StableDiffusionXLControlNetPAGImg2ImgPipeline", "StableDiffusionXLControlNetPAGPipeline",
        "StableDiffusionXLControlNetUnionImg2ImgPipeline", "StableDiffusionXLControlNetUnionInpaintPipeline",
        "StableDiffusionXLControlNetXSPipeline", "StableDiffusionXLPAGImg2ImgPipeline",
        "StableDiffusionXLPAGInpaintPipeline", "TextToVideoZeroSDXLPipeline", "ZImageControlNetInpaintPipeline",
    ),
}  # fmt: skip

MODULES: dict[str, tuple[str, ...]] = {
    "cannot be called by itself: `UNetControlNetXSModel` takes it in": ("ControlNetXSAdapter",),
    "needs torchvision": ("CosmosControlNetModel",),
    "not tried: proteins, whose tables of atoms and residues come from a preprocessor": (
        "RFD4ProteinaAutoencoder", "RFD4ProteinaTransformer",
    ),
    "writes into a cache that it is given, by one call for the next": ("WanAnimate2Transformer3DModel",),
}  # fmt: skip
