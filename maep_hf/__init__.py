"""Masked autoencoder purifier for adversarially attacked images."""

from transformers import AutoConfig, AutoImageProcessor, AutoModel

from .configuration_maep import MAEPConfig
from .image_processing_maep import MAEPImageProcessor
from .modeling_maep import MAEPModel, MAEPOutput, MAEPPreTrainedModel

AutoConfig.register("maep", MAEPConfig, exist_ok=True)
AutoModel.register(MAEPConfig, MAEPModel, exist_ok=True)
AutoImageProcessor.register(MAEPConfig, image_processor_classes={"pil": MAEPImageProcessor}, exist_ok=True)

__all__ = ["MAEPConfig", "MAEPImageProcessor", "MAEPModel", "MAEPOutput", "MAEPPreTrainedModel"]
