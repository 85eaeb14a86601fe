"""MAEP: a masked autoencoder that maps adversarially attacked images back to clean ones, in front of any classifier."""

from transformers import AutoConfig, AutoImageProcessor, AutoModel

from .classifier import PixelClassifier, PurifiedClassifier, load_classifier
from .configuration_cifar_resnet import CifarResNetConfig
from .configuration_maep import MAEPConfig
from .image_processing_maep import MAEPImageProcessor
from .modeling_cifar_resnet import CifarResNetForImageClassification
from .modeling_maep import MAEPModel, MAEPOutput, MAEPPreTrainedModel
from .pipeline_maep import ImagePurificationPipeline
from .pipeline_registration import register_pipeline

AutoConfig.register("maep", MAEPConfig, exist_ok=True)
AutoModel.register(MAEPConfig, MAEPModel, exist_ok=True)
AutoImageProcessor.register(MAEPConfig, image_processor_classes={"pil": MAEPImageProcessor}, exist_ok=True)
register_pipeline()

__all__ = [
    "CifarResNetConfig",
    "CifarResNetForImageClassification",
    "ImagePurificationPipeline",
    "MAEPConfig",
    "MAEPImageProcessor",
    "MAEPModel",
    "MAEPOutput",
    "MAEPPreTrainedModel",
    "PixelClassifier",
    "PurifiedClassifier",
    "load_classifier",
]
