"""The training loop: steps, evaluation, checkpoints, and resuming a stopped run."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from .augment import Mixer, eval_transform, train_transform
from .checkpoints import CheckpointStore, write_atomically
from .data import Batch, Images, StepSampler, eval_loader, seed_of, train_loader
from .distributed import Ranks, broadcast_buffers, only_last, shard, wrap_ddp
from .evaluate import Accuracy, autocast, evaluate
from .models import build_model, build_teacher
from .options import TrainOptions
from .progress import Progress
from .recipe import Loss, averaged, build_optimizer, learning_rate, set_learning_rate
from .sources import Data, open_data
from .watch import LossWatch

__all__ = ["Outcome", "Trainer", "train"]


class Outcome(NamedTuple):
    """The outcome of a run: its steps, and its last and best top-1 accuracy in percent."""

    steps: int
    top1: float
    best: float


def train(options: TrainOptions, ranks: Ranks) -> Outcome:
    """Trains to the end, resuming from the output folder's checkpoints, if any.

    Raises:
        ValueError, OSError, ImportError: If options, data or checkpoints are invalid.
        FloatingPointError: If the loss is not finite.
    """
    torch.use_deterministic_algorithms(options.deterministic)
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by cuBLAS
    data = open_data(options.data, options.val)
    classes = options.classes or data.classes
    if classes < data.classes:
        raise ValueError(f"the data has {data.classes} classes, the head only {classes} (--classes)")
    torch.manual_seed(options.seed)
    model = build_model(options.model, classes, checkpoint=options.checkpoint, drop_path=options.drop_path)
    if options.grad_checkpointing:
        model.set_grad_checkpointing()
    teacher = build_teacher(options.teacher, classes, options.teacher_checkpoint) if options.teacher else None
    return Trainer(model, data, classes, options, ranks, teacher).run()


class Trainer:
    """One run.

    Args:
        model: Trained in place. ``config`` says how its input is prepared.
        data: Both parts of the data set.
        classes: Number of classes.
        options: Options of the run.
        ranks: Its processes.
        teacher: Provides labels for distillation, if given.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        classes: int,
        options: TrainOptions,
        ranks: Ranks,
        teacher: nn.Module | None = None,
    ) -> None:
        self.options, self.ranks, self.data, self.classes = options, ranks, data, classes
        config: Any = model.config
        self.size: int = options.size or config["input_size"][-1]
        self.folder = Path(options.output)
        self.store = CheckpointStore(self.folder, ranks, options.keep)
        self.model = model.to(ranks.device)
        self.ema = averaged(self.model, options.ema) if options.ema else None
        parallel = self._distribute()
        self.parallel = parallel
        self.optimizer = build_optimizer(self.model, options)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=options.amp == "fp16")
        self.loss = Loss(options.label_smoothing, teacher and teacher.to(ranks.device), options.distill)
        self.mix = Mixer(options.mixup, options.cutmix, classes)
        self.train_images = Images(data.train, train_transform(options, config, self.size), train=True)
        self.eval_images = Images(data.val, eval_transform(config, self.size), train=False)
        self.step, self.best, self.top1 = 0, 0.0, 0.0
        self.sampler(0, 0)  # checked before anything is written
        self.steps_per_epoch = len(data.train) // options.batch
        self.total = options.epochs * self.steps_per_epoch
        self.skipped: set[str] = set()

    def _distribute(self) -> nn.Module:
        """Returns what the training step calls; shards or optimises the models."""
        if self.options.fsdp:
            for each in (self.model, self.ema and self.ema.module):
                if each is not None:
                    shard(each, self.ranks)
            return self.model
        if self.options.optimize:
            from ffnet_kernels import optimize

            optimize(self.model)
            if self.ema is not None:
                optimize(self.ema.module)
        return wrap_ddp(self.model, self.ranks) if self.ranks.world > 1 else self.model

    def sampler(self, start: int, stop: int) -> StepSampler:
        o, r = self.options, self.ranks
        place = {"rank": r.rank, "world": r.world, "accumulate": o.accumulate}
        return StepSampler(len(self.data.train), o.batch, seed=o.seed, start=start, stop=stop, **place)

    def run(self) -> Outcome:
        """Runs to the end of the last epoch."""
        self._resume()
        o, ranks = self.options, self.ranks
        progress = Progress(self.folder, self.total, self.step, active=ranks.is_first, tensorboard=o.tensorboard)
        for problem in [*self.data.train.problems, *self.data.val.problems]:
            progress.say(f"skipped {problem}")
        if self.step:
            progress.say(f"goes on from step {self.step} of {self.total}")
        if self.step < self.total:
            self._warm_up()
            self._steps(progress)
        self._write_weights("last.pth")
        progress.say(f"done: top-1 {self.top1:.2f} %, best {self.best:.2f} %; weights in {self.folder}")
        progress.close()
        return Outcome(self.step, self.top1, self.best)

    def _steps(self, progress: Progress) -> None:
        o = self.options
        pin = self.ranks.device.type == "cuda"
        sampler = self.sampler(self.step, self.total)
        batches = train_loader(self.train_images, sampler, workers=o.workers, pin=pin)
        watch = LossWatch(self.folder, self.ranks, delay=int(pin))
        losses: list[Tensor] = []
        progress.start()
        while self.step < self.total:
            parts = [next(batches) for _ in range(o.accumulate)]
            losses.append(self._train_step(parts, watch))
            self.step += 1
            self._name_skipped(parts, progress)
            is_last = self.step == self.total
            if self.step % o.log_every == 0 or is_last:
                loss = self.ranks.sum(torch.stack(losses).mean()).item() / self.ranks.world
                rate = self.optimizer.param_groups[0]["lr"]
                progress.show(self.step, self.step / self.steps_per_epoch, loss, rate, len(losses) * o.batch)
                losses.clear()
            due = is_last or self.step % (o.eval_every * self.steps_per_epoch) == 0
            if due or (o.checkpoint_every and self.step % o.checkpoint_every == 0):
                watch.flush()
                with progress.paused():
                    broadcast_buffers(self.model, self.ranks)
                    if self.ema is not None:
                        broadcast_buffers(self.ema.module, self.ranks)
                    self._save(self._evaluate(progress) if due else None)
        self._count_skipped(progress)

    def _train_step(self, parts: list[Batch], watch: LossWatch) -> Tensor:
        """One optimizer step on this rank's passes; returns the mean loss."""
        o, device = self.options, self.ranks.device
        # Each step is seeded by itself, so no generator states have to be saved.
        seed_everything(seed_of(o.seed, self.step, self.ranks.rank))
        rate = learning_rate(o, self.step, self.steps_per_epoch)
        set_learning_rate(self.optimizer, rate)
        total = torch.zeros((), device=device)
        for number, part in enumerate(parts):
            images = part.images.to(device, non_blocking=True)
            images, targets = self.mix(images, part.labels.to(device, non_blocking=True))
            with only_last(self.parallel, number == len(parts) - 1):
                with autocast(device, o.amp):
                    choices = self.loss.choices(images)
                    logits = self.parallel(images)
                loss = self.loss(logits, targets, choices) / len(parts)
                watch.see(self.step, loss, part, rate)
                self.scaler.scale(loss).backward()
            total += loss.detach()
        if o.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), o.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        return total

    def _warm_up(self) -> None:
        """Two passes without side effects, so that a process's first step computes exactly as later ones do.

        The first pass of an optimised model runs its modules, later ones its program; DDP rebuilds its gradient buckets
        after the first pass. Either would change the rounding of steps after a restart.
        """
        o = self.options
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        part = o.batch // (self.ranks.world * o.accumulate)
        images = torch.randn(part, 3, self.size, self.size, device=self.ranks.device)
        self.model.train()
        for _ in range(2):
            with only_last(self.parallel, True), autocast(self.ranks.device, o.amp):
                self.parallel(images).float().square().mean().backward()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)

    def _evaluate(self, progress: Progress) -> Accuracy:
        o, ranks = self.options, self.ranks
        model = self.model if self.ema is None else self.ema.module
        model.eval()
        batch = max(o.batch // (ranks.world * o.accumulate), 1)
        place = {"rank": ranks.rank, "world": ranks.world, "workers": o.workers}
        loader = eval_loader(self.eval_images, batch, pin=ranks.device.type == "cuda", **place)
        found = evaluate(model, loader, self.classes, ranks, o.amp)
        self.model.train()
        for name in set(found.skipped) - self.skipped:
            progress.say(f"skipped {name}")
        self.skipped |= set(found.skipped)
        epoch = self.step / self.steps_per_epoch
        text = f"epoch {epoch:.2f}  top-1 {found.top1:.2f} %  top-5 {found.top5:.2f} %  val loss {found.loss:.4f}"
        progress.say(text)
        progress.record(self.step, top1=found.top1, top5=found.top5, val_loss=found.loss)
        return found

    def _save(self, found: Accuracy | None) -> None:
        """Saves a checkpoint; after an evaluation also the weights, if they are the best so far."""
        if found is not None:
            self.top1 = found.top1
            if found.top1 > self.best:
                self.best = found.top1
                self._write_weights("best.pth")
        facts = {
            "step": self.step,
            "metric": found and found.top1,
            "top1": self.top1,
            "best": self.best,
            "ema_updates": 0 if self.ema is None else int(self.ema.n_averaged),
            "scaler": self.scaler.state_dict(),
            "recipe": {**self.options.recipe(), "images": len(self.data.train), "classes": self.classes},
            "world": self.ranks.world,
        }
        self.store.save(self.step, self._tensors(), facts)

    def _tensors(self) -> dict[str, Any]:
        weights, moments = get_state_dict(self.model, self.optimizer)
        tensors: dict[str, Any] = {"model": weights, "optimizer": moments}
        if self.ema is not None:
            tensors["ema"] = get_model_state_dict(self.ema.module)
        return tensors

    def _resume(self) -> None:
        found = self.store.newest()
        if found is None:
            return
        step, facts = found
        recipe = {**self.options.recipe(), "images": len(self.data.train), "classes": self.classes}
        before = facts["recipe"]
        differing = [key for key in recipe if key in before and before[key] != recipe[key]]
        if differing:
            changes = ", ".join(f"{key} {before[key]} (now {recipe[key]})" for key in differing)
            raise ValueError(f"{self.folder} is of a run with {changes}: give another --output, or the same options")
        tensors = self._tensors()
        self.store.load(step, tensors)
        set_state_dict(
            self.model, self.optimizer, model_state_dict=tensors["model"], optim_state_dict=tensors["optimizer"]
        )
        if self.ema is not None:
            set_model_state_dict(self.ema.module, tensors["ema"])
            self.ema.n_averaged.fill_(facts["ema_updates"])
        if facts["scaler"]:
            self.scaler.load_state_dict(facts["scaler"])
        self.step, self.best, self.top1 = facts["step"], facts["best"], facts["top1"]

    def _write_weights(self, name: str) -> None:
        """Writes a file for `ffnet.load_checkpoint`, on the first rank."""
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        content: dict[str, Any] = {"state_dict": get_model_state_dict(self.model, options=whole)}
        if self.ema is not None:
            content["state_dict_ema"] = get_model_state_dict(self.ema.module, options=whole)
        content["recipe"] = {"model": self.options.model, "classes": self.classes, "size": self.size, "step": self.step}
        if self.ranks.is_first:
            write_atomically(self.folder / name, content)

    def _name_skipped(self, parts: list[Batch], progress: Progress) -> None:
        new = {text for part in parts for text in part.skipped} - self.skipped
        for text in sorted(new):
            progress.say(f"skipped {text}")
        self.skipped |= new

    def _count_skipped(self, progress: Progress) -> None:
        everywhere: set[str] = set().union(*self.ranks.gather(self.skipped))
        if everywhere:
            progress.say(f"{len(everywhere)} images could not be read and were left out")
            if self.ranks.is_first:
                (self.folder / "skipped.txt").write_text("".join(f"{text}\n" for text in sorted(everywhere)))


def seed_everything(seed: int) -> None:
    """Seeds the generators of Python, NumPy and torch, on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the one that libraries draw from
    torch.manual_seed(seed)
