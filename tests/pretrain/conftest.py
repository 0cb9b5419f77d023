"""A pre-training run that has gone through all stages."""

from pathlib import Path

import pytest
from official import SMALLER
from small_runs import FEW, SHORT

from minimti.pretrain.run import pretrain
from minimti.pretrain.state import Run, begin


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> tuple[Run, Path]:
    """The run, and its folder; the model is in its folder `out`."""
    folder = tmp_path_factory.mktemp("run")
    run = begin(SMALLER, folder, folder / "out", 0, FEW, settings=SHORT)
    pretrain(run)
    return run, folder
