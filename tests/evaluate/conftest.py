"""Models for the tests of the evaluation."""

from pathlib import Path

import pytest
import torch
from ideal import IdealEvaluation
from official import SMALLER as SMALL
from official import write_official

from minimti import pipeline
from minimti.evaluate.evaluation import Settings
from minimti.svd import SVD
from minimti.world import captions


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory) -> Path:
    """Files of a small model with random weights, as pre-training leaves them."""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    write_official(folder / "tiny.safetensors", SMALL)
    captions.save(captions.CaptionEmbedding(SMALL.unet.context_dim), folder / "words.safetensors")
    return folder


@pytest.fixture(scope="session")
def random_svd(small_folder) -> SVD:
    return pipeline.load(str(small_folder / "tiny.safetensors"), device="cpu")


@pytest.fixture(scope="session")
def words(small_folder) -> captions.CaptionEmbedding:
    return captions.load(small_folder / "words.safetensors")


@pytest.fixture(scope="session")
def tiny() -> SVD:
    """The embedded model."""
    return pipeline.load("tiny", device="cpu")


@pytest.fixture
def ideal(random_svd, words, tmp_path) -> IdealEvaluation:
    return IdealEvaluation(random_svd, words, 0, Settings(motions=3, targets=3), tmp_path)
