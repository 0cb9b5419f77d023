"""An experiment for a seed, as any process can run it: a process of its own imports this module, not the program."""

import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from minimti import pipeline
from minimti.checkpoint.load import open_checkpoint
from minimti.evaluate.evaluation import Evaluation, Settings
from minimti.evaluate.experiments import EXPERIMENTS
from minimti.evaluate.results import Result
from minimti.io.files import InputError, make_folder
from minimti.svd import SVD
from minimti.world import captions
from minimti.world.clips import check_sizes


@dataclass(frozen=True)
class Task:
    """What a process must know to run experiments."""

    model: str
    device: str
    dtype: str | None
    settings: Settings
    out: Path


def run(task: Task, name: str, seed: int) -> tuple[int, str, Result, float]:
    """An experiment for a seed -> seed, name, what it found, seconds."""
    began = time.perf_counter()
    return seed, name, EXPERIMENTS[name](evaluation(task, seed)), time.perf_counter() - began


@cache
def evaluation(task: Task, seed: int) -> Evaluation:
    """The motions of a seed."""
    folder = task.out / f"seed{seed}"
    make_folder(folder)
    return Evaluation(*load(task), seed, task.settings, folder)


@cache
def load(task: Task) -> tuple[SVD, captions.CaptionEmbedding]:
    """The model and the words of its captions. Raises InputError where a file is unusable."""
    checkpoint = open_checkpoint(task.model)
    check_sizes(checkpoint.config)
    words = captions.load(checkpoint.path.with_name("words.safetensors"))
    if words.word.weight.shape[1] != checkpoint.config.unet.context_dim:
        raise InputError(f"{checkpoint.path}: does not fit words.safetensors in its folder; they have another width")
    dtype = getattr(torch, task.dtype) if task.dtype else None
    svd = pipeline.load(checkpoint, device=task.device, dtype=dtype)
    return svd, words.to(task.device)
