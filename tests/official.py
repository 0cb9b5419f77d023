"""Weights for tests: tensors that follow from their official names, and whole official-layout files of any size.

`python tests/official.py small.safetensors` writes such a file: random weights, for trying the commands.
"""

import math
import sys
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from minimti.checkpoint.find import FOLDER_FILES
from minimti.checkpoint.key_maps import folder_source, official_source
from minimti.checkpoint.load import fill, memory_format, sources
from minimti.config import MODELS, ImageEncoderConfig, SVDConfig, UNetConfig, VAEConfig, to_json
from minimti.svd import SVD

SMALL = replace(
    MODELS["svd"],
    name="small",
    num_frames=4,
    size=(128, 64),
    num_steps=3,
    unet=UNetConfig(
        in_channels=8,
        out_channels=4,
        model_channels=32,
        channel_mult=(1, 2, 4, 4),
        num_res_blocks=2,
        attention_resolutions=(4, 2, 1),
        num_head_channels=16,
        context_dim=48,
        adm_in_channels=96,
    ),
    vae=VAEConfig(ch=32, ch_mult=(1, 2, 4, 4), num_res_blocks=2, z_channels=4, scale_factor=0.18215),
    image_encoder=ImageEncoderConfig(image_size=56, patch_size=14, width=64, layers=2, head_width=16, embed_dim=48),
)

# Two levels everywhere: for tests of the method, which run it many times.
MINI = replace(
    SMALL,
    name="mini",
    size=(48, 32),
    unet=replace(SMALL.unet, channel_mult=(1, 2), attention_resolutions=(2, 1), num_res_blocks=1),
    vae=replace(SMALL.vae, ch_mult=(1, 2), num_res_blocks=1),
)


# Smaller than `tiny`, with its cells and heads: for tests that train on the world or draw it.
TINY = MODELS["tiny"]
SMALLER = replace(
    TINY,
    size=(48, 48),
    num_frames=8,
    num_steps=2,
    unet=replace(TINY.unet, model_channels=16, num_head_channels=16),
    vae=replace(TINY.vae, ch=8),
    image_encoder=replace(TINY.image_encoder, image_size=48, patch_size=16, width=32, layers=1),
)


def tensor_of(name: str, shape: tuple[int, ...]) -> Tensor:
    """The golden files' rule: a tensor follows from its official name (golden/README.md)."""
    r = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if name.endswith("mix_factor"):
        return r
    if len(shape) >= 2:
        return r / math.sqrt(math.prod(shape[1:]))
    return 1 + 0.1 * r if name.endswith("weight") else 0.1 * r


def fill_by_name(module: nn.Module, config: SVDConfig, prefix: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Gives a module on the meta device the weights of the rule, through the loader's official key map and layout."""

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for key, source in sources(module, official_source, config, prefix).items():
            tensor = source.build(*(tensor_of(name, source.shape) for name in source.names))
            yield key, tensor.to(dtype, memory_format=memory_format(tensor))

    fill(module, tensors())
    return module.eval()


def write_official(path: Path, config: SVDConfig = SMALL) -> Path:
    """A single file in the official layout, with its configuration in the metadata."""
    with torch.device("meta"):
        wanted = sources(SVD(config), official_source, config)
    tensors = {name: tensor_of(name, source.shape) for source in wanted.values() for name in source.names}
    save_file(tensors, path, {"config": to_json(config)})
    return path


def write_folder(folder: Path, svd: SVD) -> Path:
    """A model as a diffusers folder, in half precision, with its configuration in the metadata of each file."""
    state = svd.state_dict()
    files: dict[str, dict[str, torch.Tensor]] = {part: {} for part in FOLDER_FILES}
    for key, source in sources(svd, folder_source, svd.config).items():
        tensor = state[key].half()
        parts = [tensor.T] if key == "image_encoder.proj" else tensor.chunk(len(source.names))
        for name, part in zip(source.names, parts):
            network, name = name.split("/", 1)
            files[network][name] = part.contiguous()
    for part, tensors in files.items():
        path = folder / FOLDER_FILES[part].format(".fp16")
        path.parent.mkdir(parents=True)
        save_file(tensors, path, {"config": to_json(svd.config)})
    return folder


if __name__ == "__main__":
    write_official(Path(sys.argv[1]))
