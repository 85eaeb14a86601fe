"""Makes `pipeline("image-purification")` known to transformers, without a trust flag where the package is installed."""

from typing import Any

from transformers import AutoModel
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_maep import MAEPConfig
from .pipeline_maep import TASK, ImagePurificationPipeline


class _CustomTasks(dict):
    """Tasks that a repository brings code for; the task of the installed pipeline is listed but not contained."""

    def __contains__(self, task: object) -> bool:
        return task != TASK and super().__contains__(task)


class _CustomPipelines:
    """`MAEPConfig.custom_pipelines`, stored as ever, read as [`_CustomTasks`].

    transformers runs a repository's code for each task `in` that dictionary, and refuses to without
    `trust_remote_code=True`, even where the installed package has the pipeline. Without a task it takes the one listed.
    """

    def __get__(self, config: MAEPConfig | None, owner: type | None = None) -> Any:
        if config is None:
            return self
        if "custom_pipelines" not in vars(config):
            raise AttributeError("custom_pipelines")
        return _CustomTasks(vars(config)["custom_pipelines"])

    def __set__(self, config: MAEPConfig, value: dict) -> None:
        vars(config)["custom_pipelines"] = dict(value)


def register_pipeline() -> None:
    """Register [`ImagePurificationPipeline`]; with it no saved purifier needs `trust_remote_code` for this task."""
    if PIPELINE_REGISTRY.supported_tasks.get(TASK, {}).get("impl") is not ImagePurificationPipeline:
        PIPELINE_REGISTRY.register_pipeline(TASK, ImagePurificationPipeline, pt_model=AutoModel, type="image")
    MAEPConfig.custom_pipelines = _CustomPipelines()
