"""One seed, one result: the same bytes over two runs on a CPU, nearly the same tokens over numbers of threads.

Every bound is several times what was seen. The tokens of other memory modes are compared in test_pipeline.py, those of
the compiled UNet in networks/test_compile.py, those of stopped and resumed runs in test_run.py.
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from official import MINI, write_official
from PIL import Image

from minimti.config import MEMORY_MODES
from minimti.invert import Recipe
from minimti.io.video import Clip
from minimti.io.write import write_clip
from minimti.pipeline import animate, learn

pytestmark = pytest.mark.full
ROOT = Path(__file__).resolve().parents[1]
ADAM = Recipe("adam", False, False, steps=5, lr=1e-2, p_mean=0.0, p_std=1.0, crop=True, num_cached_views=2)
MUON = replace(ADAM, optimizer="muon", shared_start=True, spread_sigmas=True, lr=0.2)
# Norm of the difference over norm. Single elements differ by more in Adam, which gives a gradient of rounding's size
# a step as long as any other.
OF_THREADS = 2e-5
BOTH = """if True:
    import sys
    import sample, train
    from minimti import cli
    def both():
        sys.argv = ["train.py", "ref.mp4", "--model", "w.safetensors", "--steps", "3", "--cache", "2", "--out", "m.pt"]
        train.main()
        sys.argv = ["sample.py", "--emb", "m.pt", "img.png", "--model", "w.safetensors", "--steps", "2"]
        sample.main()
    cli.run(both)
    """


def test_two_runs_of_a_command_write_the_same_bytes(tmp_path):
    """Embedding and video, of processes that run side by side."""
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        write_official(folder / "w.safetensors", MINI)
        frames = torch.randint(0, 256, (20, 3, 32, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
        write_clip(folder / "ref.mp4", frames, 10)
        Image.fromarray(frames[0].permute(1, 2, 0).numpy()).save(folder / "img.png")
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen([sys.executable, "-c", BOTH], cwd=folder, env=environment) for folder in folders]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    for name in ("m.pt", "img_m.mp4"):
        one, two = ((folder / name).read_bytes() for folder in folders)
        assert len(one) > 1000 and one == two


@pytest.fixture(scope="module")
def clip() -> Clip:
    frames = torch.rand(4, 3, *MINI.size[::-1], generator=torch.Generator().manual_seed(7)) * 2 - 1
    return Clip(frames, 10.0, (0.0, 0.1, 0.2, 0.3), "clip", MINI.size)


def with_threads(number: int, call):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        return call()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("recipe", [ADAM, MUON], ids=["adam", "muon"])
def test_tokens_hardly_depend_on_the_number_of_threads(mini_svd, clip, recipe):
    one, again, two = (
        with_threads(threads, lambda: learn(mini_svd, clip, recipe=recipe, num_tokens=2).tokens)
        for threads in (1, 1, 2)
    )
    difference = ((one - two).norm() / one.norm()).item()
    print(f"1 and 2 threads: {difference:.1e} of the tokens' norm")
    assert torch.equal(one, again) and difference < OF_THREADS


def test_pixels_hardly_depend_on_the_number_of_threads_and_the_memory_mode(mini_svd, clip):
    motion = learn(mini_svd, clip, recipe=ADAM, num_tokens=2)
    videos = {
        (threads, memory): with_threads(
            threads, lambda memory=memory: animate(mini_svd, motion, clip.frames[:1], steps=3, memory=memory)
        )
        for threads, memory in [(2, "balanced"), *((1, memory) for memory in MEMORY_MODES)]
    }
    first = videos[1, "balanced"].int()
    differences = {key: (video.int() - first).abs().max().item() for key, video in videos.items()}
    print(f"largest differences of a pixel, of 255: {differences}")
    assert max(differences.values()) <= 1  # one of 255 steps: what rounding does
