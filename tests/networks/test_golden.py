"""Outputs of the official code, reproduced.

Runs over every file of the folder that MINIMTI_GOLDEN names (default: tests/golden). The kind of a file is its stem up
to the first underscore; sizes, batch, F and N come from the file. Expected agreement: golden/README.md.
"""

import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from official import fill_by_name
from safetensors import safe_open
from torch import Tensor

from minimti import edm
from minimti.config import MODELS, SVDConfig, UNetConfig
from minimti.networks import fused, image_encoder
from minimti.networks.layers import sinusoid
from minimti.networks.unet import UNet
from minimti.networks.vae import VAE
from minimti.svd import SVD, Conditioning

FOLDER = Path(os.environ.get("MINIMTI_GOLDEN", Path(__file__).parents[1] / "golden"))
IMPORTS = Path(__file__).parents[2], Path(__file__).parents[1]  # minimti and official.py, for a subprocess
FP32, FP64, SAMPLER_FP32 = 1e-5, 1e-10, 1e-4  # norm of the difference over norm


def read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["config"]), {name: file.get_tensor(name) for name in file.keys()}


def files(kind: str) -> list:
    """Files of a kind as test parameters; those of the full size marked so."""
    params = []
    for path in sorted(FOLDER.glob("*.safetensors")):
        if path.stem.split("_")[0] == kind:
            sizes = read(path)[0]
            full = sizes.get("model_channels", 0) >= 320 or sizes.get("ch", 0) >= 128
            params.append(pytest.param(path, id=path.stem, marks=pytest.mark.full if full else ()))
    return params


def agree(what: str, ours: Tensor, golden: Tensor, tolerance: float) -> None:
    assert ours.shape == golden.shape
    difference = ((ours.double() - golden.double()).norm() / golden.double().norm()).item()
    print(f"{what:32} {difference:.1e} (at most {tolerance:.0e})")
    assert difference < tolerance


def svd_config(sizes: dict, latent_channels: int) -> SVDConfig:
    """The configuration of a golden file, in the official configuration's names, as ours."""
    names = {field.name for field in fields(UNetConfig)} & sizes.keys()
    read = {name: tuple(value) if isinstance(value := sizes[name], list) else value for name in names}
    unet = UNetConfig(**{"in_channels": 2 * latent_channels, "out_channels": latent_channels, **read})
    return replace(MODELS["svd"], unet=unet)


@torch.no_grad()
def check_unet(path: Path, dtype: torch.dtype, expected: str, tolerance: float) -> None:
    sizes, golden = read(path)
    config = svd_config(sizes, golden["output"].shape[2])
    with torch.device("meta"):
        unet = UNet(config.unet)
    fill_by_name(unet, config, "unet.")
    unet.to(dtype)
    names = ("sample", "c_noise", "micro_conditioning", "context_spatial", "context_temporal")
    x, c_noise, micro, spatial, temporal = (golden[name].to(dtype) for name in names)
    output = unet(x, c_noise, micro, unet.project_tokens(spatial, temporal))
    agree(f"{path.stem} {dtype}", output, golden[expected], tolerance)


@pytest.mark.parametrize("path", files("unet"))
def test_unet(path):
    sizes, golden = read(path)
    vector = sinusoid(golden["micro_conditioning"], sizes["adm_in_channels"] // 3).flatten(1)
    agree(f"{path.stem} sinusoids", vector, golden["vector"], FP32)
    check_unet(path, torch.float32, "output", FP32)


@pytest.mark.parametrize("path", files("unet"))
def test_unet_in_float64(path):
    """In a process of its own, with MKL in its compatible mode.

    The sinusoids stay in fp32, and PyTorch computes their exp with MKL, whose rounding differs between processors: the
    output changes by 2e-9. In the compatible mode it is the rounding of the machine that made the files.
    """
    if "output_f64" in read(path)[1]:
        command = [sys.executable, __file__, str(path)]
        env = os.environ | {"MKL_CBWR": "COMPATIBLE", "PYTHONPATH": os.pathsep.join(map(str, IMPORTS))}
        ran = subprocess.run(command, env=env, capture_output=True, text=True)
        print(ran.stdout, end="")
        assert ran.returncode == 0, ran.stderr


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
        vae.to(dtype)
        if "moments" + suffix in golden:
            moments = vae.moments(golden["pixels"].to(dtype))
            agree(f"{path.stem} encoder {dtype}", moments, golden["moments" + suffix], tolerance)
        if "decoded" + suffix in golden:
            decoded = vae.decoder(golden["latents"].to(dtype), num_frames=len(golden["latents"]))
            agree(f"{path.stem} decoder {dtype}", decoded, golden["decoded" + suffix], tolerance)


@pytest.mark.full
def test_the_unet_through_the_fused_operators():
    """In Triton's interpreter, which takes minutes; on a GPU see tests/test_on_cuda.py."""
    pytest.importorskip("triton")
    with fused.forced(True):
        check_unet(FOLDER / "unet_plain.safetensors", torch.float32, "output", FP32)


@pytest.mark.parametrize("path", files("clip"))
def test_clip_preprocess(path):
    _, golden = read(path)
    agree(path.stem, image_encoder.preprocess(golden["image"], golden["pixels"].shape[-1]), golden["pixels"], FP32)


@torch.no_grad()
@pytest.mark.parametrize("path", files("sampler"))
def test_sampler(path):
    sizes, golden = read(path)
    config = svd_config(sizes, golden["noise"].shape[-3])
    config = replace(config, **{name: sizes[name] for name in ("sigma_min", "sigma_max", "rho")})
    sigmas = edm.karras_sigmas(sizes["steps"], config.sigma_min, config.sigma_max, config.rho)
    agree(f"{path.stem} sigmas", sigmas, golden["sigmas"], FP32)

    with torch.device("meta"):
        svd = SVD(config)
    fill_by_name(svd.unet, config, "unet.")  # the sampler needs no other
    batch, num_frames = golden["context_spatial"].shape[:2]
    cond = Conditioning(
        concat=golden["concat"][:, None].expand(-1, num_frames, -1, -1, -1),
        micro=golden["micro_conditioning"],
        spatial=golden["context_spatial"],
        temporal=golden["context_temporal"],
    )
    n = golden["noise"].unflatten(0, (batch, num_frames))
    *_, x = svd.sample(cond, n, sizes["steps"], (sizes["guidance_min"], sizes["guidance_max"]))
    agree(path.stem, x.flatten(0, 1), golden["output"], SAMPLER_FP32)


def test_every_kind_has_a_file():
    """A misspelt folder must not pass for agreement."""
    kinds = {path.stem.split("_")[0] for path in FOLDER.glob("*.safetensors")}
    assert kinds and kinds <= {"unet", "vae", "clip", "sampler"}


if __name__ == "__main__":
    check_unet(Path(sys.argv[1]), torch.float64, "output_f64", FP64)
