"""The networks and the whole sampling pipeline against diffusers, on small random weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from official import SMALL, fill_by_name
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minimti import pipeline
from minimti.bench.reference import diffusers_unet, diffusers_vae
from minimti.checkpoint.find import FOLDER_FILES
from minimti.checkpoint.key_maps import folder_source
from minimti.checkpoint.load import check, fill, sources
from minimti.config import ImageEncoderConfig, SVDConfig, UNetConfig, VAEConfig, to_json
from minimti.io.image import read_image
from minimti.networks import image_encoder
from minimti.networks.unet import UNet
from minimti.networks.vae import VAE

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")


def difference(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def their_unet(config: UNetConfig) -> nn.Module:
    unet = diffusers_unet(config)
    for name, module in unet.named_modules():
        if isinstance(module, nn.GroupNorm) and ".attentions." not in f".{name}".replace("resnets", ""):
            module.eps = 1e-5  # as in the official code
    return unet.eval()


def their_vae(config: VAEConfig) -> nn.Module:
    return diffusers_vae(config).eval()


def their_clip(config: ImageEncoderConfig) -> nn.Module:
    return transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(
            hidden_size=config.width,
            intermediate_size=4 * config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.width // config.head_width,
            image_size=config.image_size,
            patch_size=config.patch_size,
            projection_dim=config.embed_dim,
            hidden_act="gelu",
        )
    ).eval()


def meta(build, *args) -> nn.Module:
    with torch.device("meta"):
        return build(*args)


@torch.no_grad()
@given(
    levels=st.sampled_from([((1, 2), (1,)), ((1, 2, 4, 4), (4, 2, 1)), ((1, 1, 2), (4, 2))]),
    num_res_blocks=st.integers(1, 2),
    batch=st.integers(1, 2),
    num_frames=st.integers(1, 4),
    num_tokens=st.integers(1, 5),
    cells=st.tuples(st.integers(1, 2), st.integers(2, 3)),
)
def test_unet(levels, num_res_blocks, batch, num_frames, num_tokens, cells):
    channel_mult, attention_resolutions = levels
    config = replace(
        SMALL.unet,
        channel_mult=channel_mult,
        attention_resolutions=attention_resolutions,
        num_res_blocks=num_res_blocks,
    )
    ours = fill_by_name(meta(UNet, config), replace(SMALL, unet=config), "unet.", torch.float64)
    theirs = their_unet(config).double()
    theirs.load_state_dict(ours.state_dict())
    height, width = (2 ** (len(channel_mult) - 1) * n for n in cells)
    x = torch.randn(batch, num_frames, config.in_channels, height, width, dtype=torch.float64)
    c_noise = torch.randn(batch, dtype=torch.float64)
    micro = torch.tensor([[6, 127, 0.02], [10, 30, 0.1]], dtype=torch.float64)[:batch]
    tokens = torch.randn(batch, num_tokens, config.context_dim, dtype=torch.float64)
    contexts = ours.project_tokens(tokens[:, None].expand(-1, num_frames, -1, -1), tokens)
    out = ours(x, c_noise, micro, contexts)
    assert difference(out, theirs(x, c_noise, tokens, micro).sample) < 1e-10


@torch.no_grad()
@given(
    ch_mult=st.sampled_from([(1, 2), (1, 2, 4, 4), (1, 1, 2)]),
    z_channels=st.sampled_from([3, 4]),
    batch=st.integers(1, 2),
    num_frames=st.integers(1, 4),
    cells=st.tuples(st.integers(1, 3), st.integers(2, 3)),
)
def test_vae(ch_mult, z_channels, batch, num_frames, cells):
    # Always two res blocks a level: with another number diffusers changes its middle block, the official code does not.
    config = replace(SMALL.vae, ch_mult=ch_mult, z_channels=z_channels)
    ours = fill_by_name(meta(VAE, config), replace(SMALL, vae=config), "vae.", torch.float64)
    theirs = their_vae(config).double()
    theirs.load_state_dict(ours.state_dict())
    height, width = (2 ** (len(ch_mult) - 1) * n for n in cells)
    pixels = torch.rand(batch, 3, height, width, dtype=torch.float64) * 2 - 1
    assert difference(ours.encode(pixels), theirs.encode(pixels).latent_dist.mode()) < 1e-10
    z = torch.randn(batch * num_frames, z_channels, *cells, dtype=torch.float64)
    assert difference(ours.decoder(z, num_frames), theirs.decode(z, num_frames=num_frames).sample) < 1e-10


@torch.no_grad()
@given(layers=st.integers(1, 3), heads=st.integers(1, 4), batch=st.integers(1, 2))
def test_clip_tower(layers, heads, batch):
    config = replace(SMALL.image_encoder, layers=layers, width=heads * SMALL.image_encoder.head_width)
    theirs = their_clip(config).double()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    ours = meta(image_encoder.build, config)
    tensors = {f"image_encoder/{name}": tensor for name, tensor in theirs.state_dict().items()}
    wanted = sources(ours, folder_source, SMALL, "image_encoder.")
    check(wanted, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, (), "transformers")
    fill(ours, ((key, source.build(*(tensors[n] for n in source.names))) for key, source in wanted.items()))
    pixels = torch.randn(batch, 3, config.image_size, config.image_size, dtype=torch.float64)
    assert difference(ours(pixels), theirs(pixels).image_embeds) < 1e-10


def write_folder(folder, config: SVDConfig):
    """A diffusers pipeline of random weights, saved by diffusers; returns the pipeline."""
    reference = diffusers.StableVideoDiffusionPipeline(
        vae=their_vae(config.vae),
        image_encoder=their_clip(config.image_encoder),
        unet=their_unet(config.unet),
        scheduler=diffusers.EulerDiscreteScheduler(
            sigma_min=config.sigma_min,
            sigma_max=config.sigma_max,
            prediction_type="v_prediction",
            timestep_type="continuous",
            timestep_spacing="leading",
            use_karras_sigmas=True,
            steps_offset=1,
        ),
        feature_extractor=transformers.CLIPImageProcessor(),
    )
    reference.save_pretrained(folder)
    for name in FOLDER_FILES.values():  # diffusers saves no configuration of ours
        path = folder / name.format("")
        save_file(load_file(path), path, {"config": to_json(config)})
    reference.set_progress_bar_config(disable=True)
    return reference


@pytest.mark.parametrize("cond_aug", [0.02, 0.3])
def test_pipeline(tmp_path, cond_aug):
    """Image to pixels through the folder's own files: conditioning, guidance, sampler and decoder at once."""
    # The pipeline resizes to 224, whatever size the tower is of.
    config = replace(SMALL, image_encoder=replace(SMALL.image_encoder, image_size=224, patch_size=56))
    reference = write_folder(tmp_path, config)
    width, height = config.size
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    noise = torch.randn(1, config.num_frames, 4, height // 8, width // 8)
    theirs = reference(
        image,
        height=height,
        width=width,
        num_frames=config.num_frames,
        num_inference_steps=5,
        noise_aug_strength=cond_aug,
        fps=7,
        decode_chunk_size=config.num_frames,
        generator=torch.Generator().manual_seed(3),
        latents=noise,
        output_type="pt",
    ).frames

    svd = pipeline.load(str(tmp_path), device="cpu")
    image.save(tmp_path / "image.png")
    pixels = read_image(tmp_path / "image.png", config)
    with torch.inference_mode():
        micro = replace(config.micro, cond_aug=cond_aug)
        tokens = svd.tokens_of(pixels, config.num_frames)
        cond = svd.prepare(pixels, tokens, micro, torch.Generator().manual_seed(3))
        *_, latents = svd.sample(cond, noise, 5, (1.0, 3.0))
        ours = svd.decode(latents)
    assert difference(((ours + 1) / 2).clamp(0, 1), theirs) < 1e-3
