"""The official sizes: 1.5 billion parameters against diffusers, and whole files of both layouts loaded."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from official import SMALL, fill_by_name
from test_checkpoint import manifest
from test_diffusers import difference, their_unet

from minimti.checkpoint.find import FOLDER_FILES
from minimti.checkpoint.key_maps import OFFICIAL_DROPS
from minimti.config import MODELS
from minimti.networks.lowmem_decode import decode
from minimti.networks.unet import UNet
from minimti.networks.vae import VAE

pytestmark = pytest.mark.full
SVD = MODELS["svd"]


@torch.no_grad()
def test_unet_equals_diffusers():
    """Both on the same 6 GB of fp32 weights."""
    with torch.device("meta"):
        ours, theirs = UNet(SVD.unet), their_unet(SVD.unet)
    fill_by_name(ours, SVD, "unet.")
    theirs.load_state_dict(ours.state_dict(), assign=True)
    x = torch.randn(1, 3, SVD.unet.in_channels, 8, 16)
    c_noise, micro = torch.tensor([0.7]), torch.tensor([[6, 127, 0.02]])
    tokens = torch.randn(1, 5, SVD.unet.context_dim)
    out = ours(x, c_noise, micro, ours.project_tokens(tokens[:, None].expand(-1, 3, -1, -1), tokens))
    assert difference(out, theirs(x, c_noise, tokens, micro).sample) < 1e-5


@torch.no_grad()
def test_autoencoder_in_half_precision():
    """What `--vae-dtype bfloat16` costs, on random weights of reduced size: norm of the difference over norm."""
    with torch.device("meta"):
        vae = VAE(SMALL.vae)
    fill_by_name(vae, SMALL, "vae.")
    pixels, latents = torch.rand(2, 3, 64, 64) * 2 - 1, torch.randn(4, 4, 8, 8)
    plain = vae.encode(pixels), decode(vae.decoder, latents)
    vae.bfloat16()
    half = vae.encode(pixels), decode(vae.decoder, latents.bfloat16()).float()
    for what, ours, reference in zip(("encode", "decode"), half, plain):
        print(f"{what} in bfloat16: {difference(ours, reference):.1e} of the norm")
        assert difference(ours, reference) < 5e-2


def write_zeros(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str, width: int) -> None:
    """A safetensors file of zeros, sparse: gigabytes in length, next to nothing on the disk."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + width * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)


LOAD = r"""
import re, sys, torch
from minimti import pipeline
from minimti.checkpoint.load import open_checkpoint
svd = pipeline.load(sys.argv[1], device="cpu", dtype=torch.bfloat16)
assert not any(tensor.is_meta for tensor in svd.state_dict().values())
resident = sum(tensor.nbytes for tensor in svd.state_dict().values())
peak = re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]  # getrusage's begins at the parent's
print(resident, int(peak) * 1024)
"""


@pytest.mark.parametrize("layout", ["svd.safetensors", "stable-video-diffusion-img2vid"])
def test_loading_takes_little_more_than_the_weights(tmp_path, layout):
    path = tmp_path / layout
    if path.suffix:
        leftovers = {name.rstrip(".") + ".weight" if name.endswith(".") else name: (4,) for name in OFFICIAL_DROPS}
        write_zeros(path, leftovers | manifest("keys_official.tsv"), "F32", 4)
    else:
        shapes = manifest("keys_diffusers.tsv")
        for part, name in FOLDER_FILES.items():
            own = {key.removeprefix(f"{part}/"): s for key, s in shapes.items() if key.startswith(f"{part}/")}
            write_zeros(path / name.format(".fp16"), own, "F16", 2)
    done = subprocess.run([sys.executable, "-c", LOAD, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    resident, peak = map(int, done.stdout.split())
    assert resident > 4.3 * 2**30
    assert peak < resident + 1.2 * 2**30  # PyTorch itself, and what is open of the file
    print(f"{layout}: {resident / 2**30:.2f} GiB of weights, peak {peak / 2**30:.2f} GiB")
