"""The one Accelerate loop behind every script in `train/`."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    broadcast_object_list,
    gather_object,
    parse_flag_from_env,
    set_seed,
)
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup
from transformers.utils import logging as transformers_logging

from ..devices import available_cores, pick_precision, synchronize
from ..records import describe_environment, write_json
from ..storage import store_weights
from .arguments import LoopArguments
from .run_folder import RunFolder, RunFolderError
from .samples import Share, collate
from .task import Task

logger = logging.getLogger(__name__)


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite."""


def train(task: Task, args: LoopArguments, arguments: dict[str, dict[str, Any]]) -> Path:
    """Train a task, or go on where an interrupted run of the same arguments stopped.

    Args:
        task: what is trained, on what, and how it is validated.
        args: the loop's arguments.
        arguments: all arguments of the run by group, recorded in `run.json` and compared when a run is resumed.

    Returns:
        The run's folder, which loads with the model's `from_pretrained`.

    Raises:
        RunFolderError: the folder cannot be written, is too full, holds another run, one that is still going on, or
            only damaged checkpoints.
        ValueError: an argument that this model or machine does not have; nothing is written then.
        NonFiniteLossError: training diverged.
    """
    logging.getLogger("accelerate").setLevel(logging.WARNING)  # a line for every file of every checkpoint
    transformers_logging.disable_progress_bar()
    with ExitStack() as until_the_end:
        return _Loop(task, args, arguments, until_the_end).run()


class _LoopState:
    """Step counter and running sums since the last record; a part of every checkpoint."""

    def __init__(self) -> None:
        self.step = 0
        self.sums: dict[str, float] = {}
        self.summed = 0
        self.broken: set[int] = set()

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class _Loop:
    def __init__(self, task: Task, args: LoopArguments, arguments: dict[str, dict[str, Any]], until_the_end: ExitStack):
        self.task, self.args = task, args
        if args.gradient_checkpointing and not getattr(task.model, "supports_gradient_checkpointing", False):
            raise ValueError(
                f"gradient_checkpointing: a {type(task.model).__name__} cannot recompute its activations; leave it out"
            )
        self.folder = RunFolder(args.output_dir)
        # the state that the Accelerator would make: the first one made counts, and makes the group of processes
        device = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device
        self.accelerator = Accelerator(
            mixed_precision=pick_precision(args.mixed_precision, device),
            # the steps alone would give way to a variable of the environment
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=args.gradient_accumulation_steps),
            log_with=None if args.report_to == "none" else args.report_to,
            project_dir=str(self.folder.path),
            dataloader_config=DataLoaderConfiguration(dispatch_batches=False),
            step_scheduler_with_optimizer=False,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=task.leaves_weights_unused)],
        )
        self.main = self.accelerator.is_main_process
        torch.backends.cudnn.deterministic = True  # a resumed run repeats what an uninterrupted one computes
        if self.accelerator.device.type == "cpu":  # `accelerate launch` leaves a process one thread
            torch.set_num_threads(args.cpu_threads or max(1, available_cores() // self.accelerator.num_processes))
        parameter_bytes = sum(p.numel() * p.element_size() for p in task.model.parameters())
        self.push, self.resume_from = None, None
        if self.main:
            until_the_end.enter_context(self.folder.held())
            data = task.describe_data()
            from_weights = any(isinstance(group.get("model"), str) for group in arguments.values())  # or from a seed
            start = (task.describe_start() if from_weights else {}) | task.describe_frozen()
            processes = self.accelerator.num_processes
            kept, overwrite = args.save_total_limit, args.overwrite_output_dir
            precision = self.accelerator.mixed_precision  # what `auto` is here
            self.folder.prepare(
                arguments, data, 4 * parameter_bytes, kept, overwrite, processes, precision, start, self._look_around
            )
        self.accelerator.wait_for_everyone()
        # one process looks: each by itself might choose otherwise on a shared file system
        self.resume_from = broadcast_object_list([self.resume_from])[0]
        self.keeps_others = False
        if self.main and self.resume_from is None:
            record = {"task": task.name, "arguments": arguments, "data": data, **describe_environment()}
            if start:
                record["start"] = start
            record["num_processes"] = processes
            record["mixed_precision"] = precision
            record["parameters"] = sum(p.numel() for p in task.model.parameters())
            write_json(self.folder.record, record)
            self.folder.truncate_metrics(-1)
        elif self.main:
            self.keeps_others = self.folder.take_over(arguments, start)
        set_seed(args.seed)
        task.to(self.accelerator.device)
        self._build()
        if args.report_to != "none":
            flat = {
                f"{g}.{k}": v for g, vs in arguments.items() for k, v in vs.items() if isinstance(v, int | float | str)
            }
            self.accelerator.init_trackers("maep", config=flat)

    def _build(self) -> None:
        args, accelerator = self.args, self.accelerator
        model = self.task.model
        if args.channels_last:
            model.to(memory_format=torch.channels_last)
        if args.gradient_checkpointing:
            # its name before transformers 5.23, which a PeftModel has for itself too
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        self.state = _LoopState()
        self.partial: dict[str, Tensor] = {}  # losses of the micro-batches since the last step
        self.optimizer = build_optimizer(model, args)
        self.scheduler = get_cosine_schedule_with_warmup(self.optimizer, args.warmup_steps, args.max_steps)
        self.model, self.optimizer = accelerator.prepare(model, self.optimizer)
        self.ema = None
        if args.ema_decay:
            self.ema = AveragedModel(
                accelerator.unwrap_model(self.model),
                multi_avg_fn=get_ema_multi_avg_fn(args.ema_decay),
                use_buffers=True,
            )
            accelerator.register_for_checkpointing(self.ema)
        accelerator.register_for_checkpointing(self.scheduler, self.state)
        if self.resume_from is not None:
            with self.folder.loading(self.resume_from):
                accelerator.load_state(str(self.resume_from))
            if self.main:
                self.folder.truncate_metrics(self.state.step)
                logger.info("resuming from step %d of %d", self.state.step, args.max_steps)
        if args.torch_compile:
            self.model.compile()

    @property
    def best_model(self) -> nn.Module:
        """The model that is validated and saved: of the averaged weights where there are some, as the task keeps it."""
        return self.task.kept(self.ema.module if self.ema is not None else self.accelerator.unwrap_model(self.model))

    def run(self) -> Path:
        args, state = self.args, self.state
        if state.step < args.max_steps:
            self._train()
        else:
            if self.main:
                logger.info(
                    "this run is finished: %s holds its %d steps; --overwrite_output_dir starts over",
                    self.folder.path, state.step,
                )  # fmt: skip
            if any(gather_object([self.keeps_others])):  # only the main process knows
                self._start_clock()
                self._validate()
            self._export()  # it may have been stopped between its last checkpoint and this
        if args.report_to != "none":
            self.accelerator.end_training()
        if self.push is not None:
            self.push.finish(state.step)
        return self.folder.path

    def _look_around(self) -> None:
        """What may still refuse the run: it then leaves neither a repository nor a changed folder."""
        if not self.args.overwrite_output_dir:
            self.resume_from = self.folder.last_checkpoint(self.accelerator.num_processes)
        if self.args.push_to_hub:
            self.push = self._background_push()

    def _background_push(self) -> Any:
        """What cannot be pushed is known before anything is trained."""
        from ..hub.background import BackgroundPush

        args, adapters = self.args, getattr(self.task.model, "peft_config", None)
        return BackgroundPush(
            self.folder.path,
            args.hub_model_id,
            private=args.hub_private or None,
            base_model=args.hub_base_model,
            trains_adapter=bool(adapters),
            base_path=next(iter(adapters.values())).base_model_name_or_path if adapters else None,
            model=self.task.model,
        )

    def _train(self) -> None:
        args, state, accelerator = self.args, self.state, self.accelerator
        images_per_step = (
            args.per_device_train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
        )
        samples = self.task.samples(
            total=args.max_steps * images_per_step,
            start=state.step * images_per_step,
            seed=args.seed,
            share=Share(accelerator.process_index, accelerator.num_processes, args.per_device_train_batch_size),
        )
        sampler = None if isinstance(samples, IterableDataset) else range(state.step * images_per_step, len(samples))
        workers = args.dataloader_num_workers
        if sampler is None and workers > 1:
            logger.warning("dataloader_num_workers=%d: a stream is read by one", workers)
            workers = 1
        loader = accelerator.prepare(
            DataLoader(
                samples,
                batch_size=args.per_device_train_batch_size,
                sampler=sampler,
                collate_fn=collate,
                num_workers=workers,
                persistent_workers=workers > 0,
                multiprocessing_context="spawn" if workers else None,
                generator=torch.Generator(),  # or it draws from the global one, once more in a resumed run
            )
        )
        progress = tqdm(
            total=args.max_steps, initial=state.step, desc=self.task.name, disable=not self.main, unit="step"
        )
        self._start_clock()
        if state.step == 0:
            self._validate()
        self.model.train()
        for batch in loader:
            self._micro_step(batch)
            if not accelerator.sync_gradients:
                continue
            state.step += 1
            state.summed += 1
            progress.update()
            if state.step % args.logging_steps == 0 or state.step == args.max_steps:
                progress.set_postfix(self._log(), refresh=False)
            if state.step % args.eval_steps == 0 or state.step == args.max_steps:
                self._validate()
            if state.step % args.save_steps == 0 or state.step == args.max_steps:
                self._save()
        progress.close()
        if state.step < args.max_steps:
            raise RunFolderError(
                f"the data ended at step {state.step} of {args.max_steps}; start the same command again to go on from "
                f"the last checkpoint in {self.folder.checkpoints}"
            )

    def _micro_step(self, batch: dict[str, Tensor]) -> None:
        args, accelerator = self.args, self.accelerator
        self._note_broken(batch.pop("broken"))
        self.images += len(batch["labels"]) * accelerator.num_processes
        synchronize(accelerator.device)  # a GPU's queue is counted where it was filled
        started = time.perf_counter()
        with self._attack_precision():
            batch = self.task.prepare(batch)
        synchronize(accelerator.device)
        self.attack_seconds += time.perf_counter() - started
        with accelerator.accumulate(self.model):
            with accelerator.autocast():
                losses = self.task.loss(self.model, batch)
            accelerator.backward(losses["loss"])
            norm = None
            if accelerator.sync_gradients and args.max_grad_norm:
                norm = accelerator.clip_grad_norm_(self.model.parameters(), args.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        for name, value in losses.items():
            self.partial[name] = self.partial.get(name, 0.0) + value.detach().float()
        if accelerator.sync_gradients:
            self.scheduler.step()
            if self.ema is not None:
                self.ema.update_parameters(accelerator.unwrap_model(self.model))
            self._add_up(norm)

    @contextmanager
    def _attack_precision(self, model: nn.Module | None = None) -> Iterator[None]:
        """The precision of training, but float32 in place of fp16: the gradients of an attack have no loss scale and
        would vanish. Accelerate gave `model` an autocast of its own, which is then off too."""
        if self.accelerator.mixed_precision != "fp16":
            with self.accelerator.autocast():
                yield
            return
        wrapped = vars(model).get("forward") if hasattr(model, "_original_forward") else None
        if wrapped is not None:
            model.forward = model._original_forward
        try:
            yield
        finally:
            if wrapped is not None:
                model.forward = wrapped

    def _add_up(self, norm: Tensor | None) -> None:
        """Add the step's losses, averaged over micro-batches and processes, to the sums; one transfer a step."""
        accelerator, sums = self.accelerator, self.state.sums
        if norm is None or accelerator.scaler is not None:  # a loss scale that overflows skips its step by itself
            norm = torch.zeros(())
        values = torch.stack([*self.partial.values(), norm.float().to(accelerator.device)])
        *values, norm = accelerator.reduce(values, "mean").tolist()
        for name, value in zip(self.partial, values, strict=True):
            sums[name] = sums.get(name, 0.0) + value / self.args.gradient_accumulation_steps
        self.partial = {}
        if not (math.isfinite(sums["loss"]) and math.isfinite(norm)):
            what = "gradient" if math.isfinite(sums["loss"]) else "loss"
            raise NonFiniteLossError(
                f"the {what} is not finite at step {self.state.step + 1}; lower learning_rate (now "
                f"{self.args.learning_rate}), lengthen warmup_steps or use mixed_precision=no. "
                f"Checkpoints from before are in {self.folder.checkpoints}"
            )

    def _note_broken(self, broken: Tensor) -> None:
        new = set(broken[broken >= 0].tolist()) - self.state.broken
        if new:
            self.state.broken |= new
            logger.warning("%d images could not be decoded and were skipped so far", len(self.state.broken))

    def _share_broken(self) -> None:
        """Every process learns which images the others skipped."""
        if self.accelerator.num_processes > 1:
            self.state.broken = set(gather_object(sorted(self.state.broken)))

    def _start_clock(self) -> None:
        self.clock, self.attack_seconds, self.images = time.perf_counter(), 0.0, 0

    def _log(self) -> dict[str, str]:
        state = self.state
        self._share_broken()
        losses = {name: total / state.summed for name, total in state.sums.items()}
        seconds = time.perf_counter() - self.clock
        timing = {
            "images_per_second": self.images / seconds,
            "attack_seconds": self.attack_seconds,
            "model_seconds": seconds - self.attack_seconds,
            "attack_time_share": self.attack_seconds / seconds,
        }
        record = {"step": state.step, "learning_rate": self.scheduler.get_last_lr()[0], **losses}
        if self.main:
            self.folder.append_metrics(record | timing | {"broken_images": len(state.broken)})
            self.accelerator.log({f"train/{k}": v for k, v in (losses | timing).items()}, step=state.step)
        state.sums, state.summed = {}, 0
        self._start_clock()
        return {"loss": f"{losses['loss']:.4g}", "images/s": f"{timing['images_per_second']:.0f}",
                "attack": f"{timing['attack_time_share']:.0%}"}  # fmt: skip

    def _validate(self) -> None:
        started = time.perf_counter()
        if self.main:
            model = self.best_model
            was_training = model.training
            model.eval()
            with self._attack_precision(model):
                metrics = self.task.evaluate(model)
            self.folder.previews.mkdir(exist_ok=True)
            self.task.preview(model, self.folder.previews / f"step-{self.state.step:07d}.png")
            model.train(was_training)
            self.folder.append_metrics({"step": self.state.step, "validation": metrics})
            self.accelerator.log({f"validation/{k}": v for k, v in metrics.items()}, step=self.state.step)
            line = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            tqdm.write(f"step {self.state.step}: {line}")
        self.accelerator.wait_for_everyone()
        self.clock += time.perf_counter() - started  # validation is not training time

    def _save(self) -> None:
        started = time.perf_counter()
        self._share_broken()
        self.folder.save_checkpoint(
            self.state.step,
            lambda path: self.accelerator.save_state(str(path)),
            self.accelerator.wait_for_everyone,
            self.main,
            self.args.save_total_limit,
        )
        self._export()
        if self.push is not None and self.args.hub_strategy == "every_save" and self.state.step < self.args.max_steps:
            self.push.start(self.state.step)
        self.clock += time.perf_counter() - started

    def _export(self) -> None:
        if self.main:
            with self.folder.writing("the model"):
                self.folder.export(self._save_model)
        self.accelerator.wait_for_everyone()

    def _save_model(self, folder: Path) -> None:
        self.task.export(self.best_model, folder)
        if self.args.export_dtype != "float32":
            for saved in {path.parent for path in folder.rglob("*.safetensors")}:  # an adapter's lie below
                store_weights(saved, self.args.export_dtype)


def build_optimizer(model: nn.Module, args: LoopArguments) -> torch.optim.Optimizer:
    """AdamW or SGD over the trainable parameters; vectors (norms, biases, tokens) carry no weight decay."""
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.squeeze().ndim > 1 or (".lora_" in name and parameter.ndim > 1)  # also of rank 1
            (decayed if is_matrix else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": free, "weight_decay": 0.0}]
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=args.learning_rate, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95))
