"""Outputs of the official code, reproduced.

Runs over every file of the folder MINIMTI_GOLDEN names (default: tests/golden). The kind of a file is its stem up to
the first underscore; sizes, batch, F and N come from the file. Expected agreement: golden/README.md.
"""

import json
import os
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from official import fill_by_name
from safetensors import safe_open
from torch import Tensor

from minimti import clip, edm
from minimti.config import MODELS, SVDConfig, UNetConfig
from minimti.layers import sinusoid
from minimti.svd import SVD, Conditioning
from minimti.unet import UNet
from minimti.vae import VAE

FOLDER = Path(os.environ.get("MINIMTI_GOLDEN", Path(__file__).parent / "golden"))
FP32, FP64, SAMPLER_FP32 = 1e-5, 1e-10, 1e-4  # norm of the difference over norm


def read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["config"]), {name: file.get_tensor(name) for name in file.keys()}


def files(kind: str) -> list:
    """Files of a kind as test parameters; those of the full size marked so."""
    params = []
    for path in sorted(FOLDER.glob("*.safetensors")):
        if path.stem.split("_")[0] == kind:
            width = read(path)[0].get("model_channels", 0)
            full = width >= MODELS["svd"].unet.model_channels
            params.append(pytest.param(path, id=path.stem, marks=pytest.mark.full if full else ()))
    return params


def difference(ours: Tensor, golden: Tensor) -> float:
    assert ours.shape == golden.shape
    return ((ours.double() - golden.double()).norm() / golden.double().norm()).item()


def svd_config(sizes: dict, latent_channels: int) -> SVDConfig:
    """The configuration of a golden file, in the official configuration's names, as ours."""
    names = {field.name for field in fields(UNetConfig)} & sizes.keys()
    read = {name: tuple(value) if isinstance(value := sizes[name], list) else value for name in names}
    unet = UNetConfig(**{"in_channels": 2 * latent_channels, "out_channels": latent_channels, **read})
    return replace(MODELS["svd"], unet=unet)


@torch.no_grad()
@pytest.mark.parametrize("path", files("unet"))
def test_unet(path):
    sizes, golden = read(path)
    config = svd_config(sizes, golden["output"].shape[2])
    with torch.device("meta"):
        unet = UNet(config.unet)
    fill_by_name(unet, config, "unet.")
    inputs = [
        golden[name] for name in ("sample", "c_noise", "micro_conditioning", "context_spatial", "context_temporal")
    ]
    vector = sinusoid(golden["micro_conditioning"], sizes["adm_in_channels"] // 3).flatten(1)
    assert difference(vector, golden["vector"]) < FP32
    assert difference(unet(*inputs), golden["output"]) < FP32
    if "output_f64" in golden:
        # Sinusoids are fp32 whatever the inputs are.
        assert difference(unet.double()(*(x.double() for x in inputs)), golden["output_f64"]) < FP64


@torch.no_grad()
@pytest.mark.parametrize("path", files("vae"))
def test_vae(path):
    sizes, golden = read(path)
    config = replace(
        MODELS["svd"].vae,
        ch=sizes["ch"],
        ch_mult=tuple(sizes["ch_mult"]),
        num_res_blocks=sizes["num_res_blocks"],
        z_channels=sizes["z_channels"],
    )
    with torch.device("meta"):
        vae = VAE(config)
    fill_by_name(vae, replace(MODELS["svd"], vae=config), "vae.")
    for dtype, suffix, tolerance in ((torch.float32, "", FP32), (torch.float64, "_f64", FP64)):
        if "moments" + suffix in golden:
            vae.to(dtype)
            moments = vae.moments(golden["pixels"].to(dtype))
            latents = golden["latents"].to(dtype)
            assert difference(moments, golden["moments" + suffix]) < tolerance
            assert difference(vae.encode(golden["pixels"].to(dtype)), moments.chunk(2, dim=1)[0]) < tolerance
            assert difference(vae.decoder(latents, len(latents)), golden["decoded" + suffix]) < tolerance
            decoded = vae.decode((latents * config.scale_factor)[None])[0]
            assert difference(decoded, golden["decoded" + suffix]) < max(tolerance, 10 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("path", files("clip"))
def test_clip_preprocess(path):
    _, golden = read(path)
    assert difference(clip.preprocess(golden["image"], golden["pixels"].shape[-1]), golden["pixels"]) < FP32


@torch.no_grad()
@pytest.mark.parametrize("path", files("sampler"))
def test_sampler(path):
    sizes, golden = read(path)
    config = svd_config(sizes, golden["noise"].shape[-3])
    config = replace(config, **{name: sizes[name] for name in ("sigma_min", "sigma_max", "rho")})
    sigmas = edm.karras_sigmas(sizes["steps"], config.sigma_min, config.sigma_max, config.rho)
    assert difference(sigmas, golden["sigmas"]) < FP32

    batch, num_frames = golden["context_spatial"].shape[:2]
    with torch.device("meta"):
        svd = SVD(config)
    fill_by_name(svd.unet, config, "unet.")  # the sampler needs no other
    n = golden["noise"].unflatten(0, (batch, num_frames))
    cond = Conditioning(
        concat=golden["concat"][:, None].expand(-1, num_frames, -1, -1, -1),
        micro=golden["micro_conditioning"],
        spatial=golden["context_spatial"],
        temporal=golden["context_temporal"],
    )
    *_, x = svd.sample(cond, n, sizes["steps"], (sizes["guidance_min"], sizes["guidance_max"]))
    assert difference(x.flatten(0, 1), golden["output"]) < SAMPLER_FP32


def test_every_kind_has_a_file():
    """A misspelt folder must not pass for agreement."""
    kinds = {path.stem.split("_")[0] for path in FOLDER.glob("*.safetensors")}
    assert kinds and kinds <= {"unet", "vae", "clip", "sampler"}
