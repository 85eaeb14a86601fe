"""Training: one Accelerate loop, the tasks it trains, and their arguments."""

from .arguments import DataArguments, LoopArguments
from .classification import ClassificationTask
from .loop import NonFiniteLossError, train
from .recipes import as_groups, parse_arguments, run_script
from .run_folder import RunFolder, RunFolderError
from .samples import Augmentation, PositionedImages, StreamedImages
from .task import Task

__all__ = [
    "Augmentation",
    "ClassificationTask",
    "DataArguments",
    "LoopArguments",
    "NonFiniteLossError",
    "PositionedImages",
    "RunFolder",
    "RunFolderError",
    "StreamedImages",
    "Task",
    "as_groups",
    "parse_arguments",
    "run_script",
    "train",
]
