"""Many works in one process, as in a notebook or a service: memory and open files stay as they are."""

import ctypes
import gc
import io
import os
import warnings
from itertools import cycle, islice
from pathlib import Path

import pytest
import torch
from official import MINI, write_official
from PIL import Image

from minimti.checkpoint.load import open_checkpoint
from minimti.invert import Recipe
from minimti.io.files import InputError
from minimti.io.image import read_image
from minimti.io.video import Clip, read_clip
from minimti.io.write import write_clip
from minimti.motion import Motion
from minimti.pipeline import animate, learn

SIZE = (800, 600)  # damaged pictures and films: decoded, each is more than 1 MB that could be kept
RECIPE = Recipe("adam", False, False, steps=3, lr=1e-2, p_mean=0.0, p_std=1.0, crop=True, num_cached_views=2)


def state_of_process() -> tuple[int, int]:
    """Bytes that are resident, without what the allocator could give back; and open files."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))


def damaged_files(folder: Path) -> list:
    """-> calls, each of which reads a file and is refused late: after most of it has been read or decoded."""
    picture = Image.effect_noise(SIZE, 50).convert("RGB")
    for name, options in (("a.jpg", {}), ("a.png", {"compress_level": 1})):
        buffer = io.BytesIO()
        picture.save(buffer, {"a.jpg": "JPEG", "a.png": "PNG"}[name], **options)
        (folder / name).write_bytes(buffer.getvalue()[: -len(buffer.getvalue()) // 10])
    noise = torch.randint(0, 256, (6, 3, SIZE[1] // 2, SIZE[0] // 2), dtype=torch.uint8)
    write_clip(folder / "a.mp4", noise, 10)
    Motion(torch.full((5, 1000, 48), 1.0), 4, "mini", MINI.micro, MINI.size, 3, 0).save(folder / "m.safetensors")
    content = (folder / "m.safetensors").read_bytes()
    (folder / "m.safetensors").write_bytes(content.replace(torch.ones(8).numpy().tobytes(), b"\xff" * 32))  # NaN
    weights = write_official(folder / "w.safetensors", MINI)
    weights.write_bytes(weights.read_bytes()[:-1000])
    return [
        lambda: read_image(folder / "a.jpg", MINI),
        lambda: read_image(folder / "a.png", MINI),
        lambda: read_clip(folder / "a.mp4", MINI, num_frames=20, stride=1),
        lambda: Motion.load(folder / "m.safetensors"),
        lambda: open_checkpoint(str(folder / "w.safetensors")),
        lambda: read_clip(folder / "none.mp4", MINI),
    ]


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is measured on Linux")
def test_memory_is_flat_over_30_samples_9_inversions_and_600_failed_reads(mini_svd, tmp_path):
    torch.set_num_threads(1)  # tensors are small, and threads would wait for each other
    clip = Clip(torch.rand(4, 3, *MINI.size[::-1]) * 2 - 1, 10.0, (0.0, 0.1, 0.2, 0.3), "clip", MINI.size)
    image, reads = clip.frames[:1], damaged_files(tmp_path)

    def third() -> None:
        for _ in range(3):
            motion = learn(mini_svd, clip, recipe=RECIPE, num_tokens=2)
        for _ in range(10):
            animate(mini_svd, motion, image, steps=2)
        for read in islice(cycle(reads), 200):
            with warnings.catch_warnings(), pytest.raises(InputError):
                warnings.simplefilter("ignore")
                read()

    states = []
    for _ in range(3):
        third()
        states.append(state_of_process())
    print([f"{resident / 2**20:.1f} MiB, {files} files" for resident, files in states])
    (_, files), (second, _), (last, files_last) = states
    assert files_last == files
    assert last - second < 2**20  # 3 inversions, 10 samples and 200 reads later
