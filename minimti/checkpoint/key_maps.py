"""The names of tensors in the two layouts of official weight files.

The single file (`svd.safetensors`, `svd_xt.safetensors`) has the names of Stability's code; the folder has those of
diffusers and transformers. The networks here use the names of diffusers (the image encoder: those of open_clip).
`official_source` and `folder_source` map each tensor of the networks to the tensors of the file that it is made from.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from minimti.config import SVDConfig

# Prefixes of tensors in the single file that are not loaded, and why.
OFFICIAL_DROPS = {
    "conditioner.embedders.0.open_clip.model.ln_final.": "CLIP's text tower, incomplete in the file, not used by SVD",
    "conditioner.embedders.0.open_clip.model.logit_scale": "the same",
    "conditioner.embedders.0.open_clip.model.positional_embedding": "the same",
    "conditioner.embedders.0.open_clip.model.text_projection": "the same",
    "conditioner.embedders.0.open_clip.model.token_embedding.": "the same",
    "conditioner.embedders.3.encoder.decoder.": "decodes single images; clips use the temporal decoder",
    "conditioner.embedders.3.encoder.post_quant_conv.": "belongs to that decoder",
    "first_stage_model.encoder.": "a second copy of the encoder; used only where the conditioner's is missing",
}
# Where the tensors of the image encoder are, in the single file and in the diffusers folder.
OFFICIAL_IMAGE_ENCODER = "conditioner.embedders.0.open_clip.model.visual."
FOLDER_IMAGE_ENCODER = "image_encoder/"


@dataclass(frozen=True)
class Source:
    """How one tensor of a network is made: `build` takes the file's tensors `names`, each of shape `shape`."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    build: Callable[..., Tensor] = lambda tensor: tensor


# ---------------------------------------------------------------------------------------------- the official layout


def official_source(key: str, shape: tuple[int, ...], config: SVDConfig) -> Source:
    """The source in the single file of the tensor `key`, of shape `shape`, in `SVD.state_dict()`.

    A key begins with the name of its network: "unet.", "vae." or "image_encoder.".
    """
    network, name = key.split(".", 1)
    if network == "unet":
        return Source(("model.diffusion_model." + _official_unet(name, config),), shape)
    if network == "image_encoder":
        return Source((OFFICIAL_IMAGE_ENCODER + name,), shape)
    prefix = "first_stage_model." if name.startswith("decoder.") else "conditioner.embedders.3.encoder."
    official = prefix + _official_vae(name, config)
    if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", official):
        # A 1x1 convolution there, a linear layer [out, in] here.
        return Source((official,), (*shape, 1, 1), lambda weight: weight[:, :, 0, 0])
    return Source((official,), shape)


def _substitute(name: str, table: dict[str, str]) -> str:
    """Applies the first rule of {pattern: replacement} whose pattern occurs in the name."""
    for pattern, replacement in table.items():
        name, count = re.subn(pattern, replacement, name)
        if count:
            break
    return name


_UNET_ENDS = {
    r"^conv_in\.": "input_blocks.0.0.",
    r"^conv_norm_out\.": "out.0.",
    r"^conv_out\.": "out.2.",
    r"^time_embedding\.linear_1\.": "time_embed.0.",
    r"^time_embedding\.linear_2\.": "time_embed.2.",
    r"^add_embedding\.linear_1\.": "label_emb.0.0.",
    r"^add_embedding\.linear_2\.": "label_emb.0.2.",
    r"^mid_block\.resnets\.0\.": "middle_block.0.",
    r"^mid_block\.attentions\.0\.": "middle_block.1.",
    r"^mid_block\.resnets\.1\.": "middle_block.2.",
}
_RES_BLOCK = {
    r"norm1\.": "in_layers.0.",
    r"conv1\.": "in_layers.2.",
    r"time_emb_proj\.": "emb_layers.1.",
    r"norm2\.": "out_layers.0.",
    r"conv2\.": "out_layers.3.",
    r"conv_shortcut\.": "skip_connection.",
}
_UNET_TRANSFORMER = {
    r"temporal_transformer_blocks\.": "time_stack.",
    r"time_pos_embed\.linear_1\.": "time_pos_embed.0.",
    r"time_pos_embed\.linear_2\.": "time_pos_embed.2.",
}


def _official_unet(name: str, config: SVDConfig) -> str:
    """The official code has one flat list of entries per direction, input_blocks and output_blocks.

    An entry is a list: a res block, then its transformer if it has one, then, in the last entry of a level on the way
    up, the upsampling. On the way down, downsampling is an entry of its own.
    """
    n, levels = config.unet.num_res_blocks, len(config.unet.channel_mult)
    match = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", name)
    if match is None:
        name = _substitute(name, _UNET_ENDS)
        part = "resnets" if re.match(r"middle_block\.[02]\.", name) else "attentions"
        return _official_unet_part(part, name) if name.startswith("middle_block.") else name
    direction, level, part, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    rest = _official_unet_part(part, rest)
    if part == "downsamplers":
        return f"input_blocks.{(level + 1) * (n + 1)}.0.op.{rest.removeprefix('conv.')}"
    if part == "upsamplers":
        attends = 2 ** (levels - 1 - level) in config.unet.attention_resolutions
        return f"output_blocks.{level * (n + 1) + n}.{2 if attends else 1}.{rest}"
    entry = 1 + level * (n + 1) + index if direction == "down" else level * (n + 1) + index
    return f"{'in' if direction == 'down' else 'out'}put_blocks.{entry}.{0 if part == 'resnets' else 1}.{rest}"


def _official_unet_part(part: str, name: str) -> str:
    if part == "resnets":
        name = name.replace("spatial_res_block.", "").replace("temporal_res_block.", "time_stack.")
        return _substitute(name, _RES_BLOCK)
    return _substitute(name, _UNET_TRANSFORMER) if part == "attentions" else name


_VAE_ENDS = {
    r"conv_norm_out\.": "norm_out.",
    r"decoder\.time_conv_out\.": "decoder.conv_out.time_mix_conv.",
    r"mid_block\.resnets\.0\.": "mid.block_1.",
    r"mid_block\.resnets\.1\.": "mid.block_2.",
    r"mid_block\.attentions\.0\.group_norm\.": "mid.attn_1.norm.",
    r"mid_block\.attentions\.0\.to_([qkv])\.": r"mid.attn_1.\1.",
    r"mid_block\.attentions\.0\.to_out\.0\.": "mid.attn_1.proj_out.",
    r"down_blocks\.(\d+)\.resnets\.": r"down.\1.block.",
    r"down_blocks\.(\d+)\.downsamplers\.0\.": r"down.\1.downsample.",
}


def _official_vae(name: str, config: SVDConfig) -> str:
    """The official decoder numbers its levels from the finest: the level that runs first has the highest number."""
    if match := re.match(r"decoder\.up_blocks\.(\d+)\.(.*)", name):
        rest = match[2].replace("resnets.", "block.").replace("upsamplers.0.", "upsample.")
        name = f"decoder.up.{len(config.vae.ch_mult) - 1 - int(match[1])}.{rest}"
    name = _substitute(name, _VAE_ENDS)
    name = name.replace("time_mixer.", "").replace("spatial_res_block.", "").replace("conv_shortcut.", "nin_shortcut.")
    if "temporal_res_block." in name:
        name = _substitute(name.replace("temporal_res_block.", "time_stack."), _RES_BLOCK)
    return name


# ---------------------------------------------------------------------------------------------- the diffusers layout

_IMAGE_ENCODER = {
    r"^class_embedding$": "embeddings.class_embedding",
    r"^positional_embedding$": "embeddings.position_embedding.weight",
    r"^conv1\.": "embeddings.patch_embedding.",
    r"^ln_pre\.": "pre_layrnorm.",
    r"^ln_post\.": "post_layernorm.",
    r"^transformer\.resblocks\.(\d+)\.ln_([12])\.": r"encoder.layers.\1.layer_norm\2.",
    r"^transformer\.resblocks\.(\d+)\.mlp\.c_fc\.": r"encoder.layers.\1.mlp.fc1.",
    r"^transformer\.resblocks\.(\d+)\.mlp\.c_proj\.": r"encoder.layers.\1.mlp.fc2.",
    r"^transformer\.resblocks\.(\d+)\.attn\.out_proj\.": r"encoder.layers.\1.self_attn.out_proj.",
    r"^transformer\.resblocks\.(\d+)\.attn\.in_proj_": r"encoder.layers.\1.self_attn.{}_proj.",
}


def folder_source(key: str, shape: tuple[int, ...], config: SVDConfig) -> Source:
    """The source in the diffusers folder of the tensor `key`, of shape `shape`, in `SVD.state_dict()`.

    The names of the source begin with the folder of their file and a slash, as in `find.folder_paths`.
    """
    network, name = key.split(".", 1)
    if network != "image_encoder":
        return Source((f"{network}/{name}",), shape)
    if name == "proj":
        # A matrix [in, out] here, the weight [out, in] of a linear layer there.
        theirs = FOLDER_IMAGE_ENCODER + "visual_projection.weight"
        return Source((theirs,), shape[::-1], lambda weight: weight.T.contiguous())
    theirs = FOLDER_IMAGE_ENCODER + "vision_model." + _substitute(name, _IMAGE_ENCODER)
    if "{}" in theirs:  # open_clip has one matrix [3 width, width] for queries, keys and values
        names = tuple(theirs.format(part) for part in "qkv")
        return Source(names, (shape[0] // 3, *shape[1:]), lambda *parts: torch.cat(parts))
    return Source((theirs,), shape)
