"""Three ways to train one model on the same windows: Hugging Face's Trainer, a plain loop, train.py.

A module of compare_trainers.py, which times them in turns. Section 8.5.
"""

import os
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch._dynamo  # before the group, or gloo's threads outlive it: section 3.8
import torch.distributed as dist
import torch.nn.functional as F
from data import Loader, Tokens, read_meta, shards_of
from export_hf import hf_config, names
from launch import stop
from metrics import Busy
from model import Config, Llama
from optimizer import make_optimizers
from parallel import init_weights, make_mesh, parallelize
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from train import update

DTYPES = {"float32": None, "bfloat16": torch.bfloat16}  # of the products
CLIP = 1.0


@dataclass(frozen=True)
class Race:
    """One model; each trainer makes `burst` steps in a row, `rounds` times after a first one."""

    name: str
    config: Config
    batch: int  # windows per step, of all ranks
    rounds: int
    burst: int

    @property
    def steps(self) -> int:
        return (self.rounds + 1) * self.burst  # the first round warms up

    @property
    def tokens(self) -> int:
        return self.batch * self.config.context  # of a step


def train_py(race: Race, args: Namespace, device: torch.device) -> Iterator[torch.Tensor]:
    """train.py's step on its own loader; yields this rank's part of the batch's mean loss."""
    ddp_model, optimizers = model_of_train_py(race, args, device)
    flags = {"batch": race.batch, "context": race.config.context, "clip": CLIP}
    flags = Namespace(**flags, accumulate=1, optimizer="adamw")
    busy = Busy(device)
    for window in loader_of(race, args, dist.get_rank()):
        window = window.to(device, non_blocking=True)
        yield update(ddp_model, optimizers, window, flags, dist.get_world_size(), busy)[0]


def model_of_train_py(
    race: Race, args: Namespace, device: torch.device
) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    with torch.device("meta"):
        model = Llama(race.config)
    mesh = make_mesh(device.type, -1, 1, 1)
    ddp_model = parallelize(model, mesh, dtype=DTYPES[args.dtype], seed=args.seed)
    return ddp_model, make_optimizers(ddp_model, "adamw", args.lr)


def plain_loop(
    race: Race, windows: torch.Tensor, args: Namespace, device: torch.device
) -> Iterator[torch.Tensor]:
    """What one writes first: DDP, AdamW, and the loss read in every step. Yields the same."""
    n = dist.get_world_size()
    model = whole_model(race.config, args.seed, device)
    ddp_model = DistributedDataParallel(model)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))
    share = windows[:, dist.get_rank()].flatten(0, 1)
    for window in DataLoader(share, batch_size=race.batch // n):
        loss = mean_loss(ddp_model, window.to(device), args)
        loss.backward()
        nn.utils.clip_grad_norm_(ddp_model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # for a progress bar: the host waits for the device
        yield loss.detach() / n


def hf_trainer(
    race: Race,
    windows: torch.Tensor,
    args: Namespace,
    device: torch.device,
    after_step: Callable[[int], None],
) -> list[torch.Tensor]:
    """Train by transformers' Trainer, which calls `after_step` with 0 and after each step.

    Returns this rank's parts of the losses. What differs from the Trainer's defaults is there for
    the same arithmetic as in the other two, or to keep it from writing files.
    """
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    if device.type == "cpu":  # else DeepSpeed, if it is there, prints what it has found
        os.environ.setdefault("DS_ACCELERATOR", "cpu")

    class AfterStep(TrainerCallback):
        def on_train_begin(self, *_, **__) -> None:
            after_step(0)

        def on_step_end(self, _, state, *__, **___) -> None:
            after_step(state.global_step)

    model = hf_model(race.config, args.seed, device)
    losses: list[torch.Tensor] = []
    model.register_forward_hook(lambda _, __, output: losses.append(output.loss.detach().clone()))
    dataset = [
        {"input_ids": window[:-1], "labels": window[:-1], "shift_labels": window[1:]}
        for window in windows.flatten(0, 2)
    ]
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            folder, max_steps=race.steps,
            per_device_train_batch_size=race.batch // dist.get_world_size(),
            train_sampling_strategy="sequential",
            remove_unused_columns=False,  # else it drops shift_labels, and trains on other targets
            learning_rate=args.lr, lr_scheduler_type="constant",
            weight_decay=0.1, adam_beta2=0.95, max_grad_norm=CLIP,
            bf16=args.dtype == "bfloat16", use_cpu=device.type == "cpu",
            disable_tqdm=True, logging_strategy="no", save_strategy="no", report_to="none",
        )  # fmt: skip
        trainer = Trainer(model, options, train_dataset=dataset, callbacks=[AfterStep()])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        dist.barrier()  # nobody deletes the folder while another may look for it
    return losses


def mean_loss(model: nn.Module, window: torch.Tensor, args: Namespace) -> torch.Tensor:
    dtype = DTYPES[args.dtype]
    with torch.autocast(window.device.type, dtype, enabled=dtype is not None):
        logits = model(window[:, :-1])  # [windows, context, vocabulary]
    return F.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())


def whole_model(config: Config, seed: int, device: torch.device) -> Llama:
    """With the weights that train.py's model has in any layout."""
    model = Llama(config).to(device)
    init_weights(model, seed)
    return model


def hf_model(config: Config, seed: int, device: torch.device) -> nn.Module:
    """transformers' Llama of the same shape, with the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**hf_config(config))).to(device)
    weights = whole_model(config, seed, device).state_dict()
    renamed = {hf: weights[ours] for ours, hf in names(config.layers).items()}
    model.load_state_dict(renamed, strict=False)  # the output layer is the embedding
    return model


def loader_of(race: Race, args: Namespace, rank: int) -> Loader:
    tokens = Tokens(args.data, shards_of(read_meta(args.data), "train"), race.config.context)
    if len(tokens) < race.batch:
        stop(f"--batch {race.batch}, but there are {len(tokens)} windows: type a smaller one")
    return Loader(tokens, race.batch, rank, dist.get_world_size(), args.seed)


def windows_of(race: Race, args: Namespace) -> torch.Tensor:
    """What train.py's loader gives to each rank: [steps, ranks, windows, context + 1]."""
    loaders = [iter(loader_of(race, args, rank)) for rank in range(dist.get_world_size())]
    return torch.stack(
        [torch.stack([next(loader) for loader in loaders]) for _ in range(race.steps)]
    )
