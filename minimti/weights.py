"""Official weight files: find them, or download them, and load them strictly.

Two layouts exist. The single file (`svd.safetensors`, `svd_xt.safetensors`) has the names of Stability's code; the folder
has those of diffusers and transformers. The networks here use the diffusers names (the CLIP tower: open_clip's), and
`official_source` and `folder_source` say, for every tensor of ours, which tensor of a file it is.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minimti.config import MODELS, SVDConfig, from_json
from minimti.files import InputError, existing
from minimti.svd import SVD

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"

REPOSITORIES = {
    "svd": "stabilityai/stable-video-diffusion-img2vid",
    "svd-xt": "stabilityai/stable-video-diffusion-img2vid-xt",
}
SINGLE_FILES = {"svd": "svd.safetensors", "svd-xt": "svd_xt.safetensors"}
FOLDER_FILES = {
    "unet": "unet/diffusion_pytorch_model{}.safetensors",
    "vae": "vae/diffusion_pytorch_model{}.safetensors",
    "image_encoder": "image_encoder/model{}.safetensors",
}

# Tensors of the single file that stay behind, and why.
OFFICIAL_DROPS = {
    "conditioner.embedders.0.open_clip.model.ln_final.": "CLIP's text tower, of which only leftovers are there",
    "conditioner.embedders.0.open_clip.model.logit_scale": "the same",
    "conditioner.embedders.0.open_clip.model.positional_embedding": "the same",
    "conditioner.embedders.0.open_clip.model.text_projection": "the same",
    "conditioner.embedders.0.open_clip.model.token_embedding.": "the same",
    "conditioner.embedders.3.encoder.decoder.": "decodes single images; clips have the temporal decoder",
    "conditioner.embedders.3.encoder.post_quant_conv.": "belongs to that decoder",
    "first_stage_model.encoder.": "a second copy of the encoder; serves where the conditioner's is missing",
}


@dataclass(frozen=True)
class Source:
    """Where one tensor of ours comes from: `build` makes it of the file's tensors `names`, each of shape `shape`."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    build: Callable[..., Tensor] = lambda tensor: tensor


# ---------------------------------------------------------------------------------------------- the official layout


def official_source(key: str, shape: tuple[int, ...], config: SVDConfig) -> Source:
    """The source in the single file of our tensor `key` ("unet.", "vae." or "clip." and its name) of shape `shape`."""
    network, name = key.split(".", 1)
    if network == "unet":
        return Source(("model.diffusion_model." + _official_unet(name, config),), shape)
    if network == "clip":
        return Source(("conditioner.embedders.0.open_clip.model.visual." + name,), shape)
    prefix = "first_stage_model." if name.startswith("decoder.") else "conditioner.embedders.3.encoder."
    official = prefix + _official_vae(name, config)
    if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", official):  # a 1x1 convolution where we have a linear layer
        return Source((official,), (*shape, 1, 1), lambda weight: weight[:, :, 0, 0])
    return Source((official,), shape)


def _substitute(name: str, table: dict[str, str]) -> str:
    """Applies the first rule whose pattern stands in the name."""
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
    """The official code keeps one flat list per direction: an entry is a res block, with its transformer and, on the
    way up, with the upsampling behind it; on the way down the resampling is an entry of its own."""
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
    """The official decoder counts its levels from the finest, so the one that runs first has the highest number."""
    if match := re.match(r"decoder\.up_blocks\.(\d+)\.(.*)", name):
        rest = match[2].replace("resnets.", "block.").replace("upsamplers.0.", "upsample.")
        name = f"decoder.up.{len(config.vae.ch_mult) - 1 - int(match[1])}.{rest}"
    name = _substitute(name, _VAE_ENDS)
    name = name.replace("time_mixer.", "").replace("spatial_res_block.", "").replace("conv_shortcut.", "nin_shortcut.")
    if "temporal_res_block." in name:
        name = _substitute(name.replace("temporal_res_block.", "time_stack."), _RES_BLOCK)
    return name


# ---------------------------------------------------------------------------------------------- the diffusers layout

_CLIP_NAMES = {
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
    """The source in the diffusers folder of our tensor `key`; a name is preceded by its folder and a slash."""
    network, name = key.split(".", 1)
    if network != "clip":
        return Source((f"{network}/{name}",), shape)
    if name == "proj":
        return Source(("image_encoder/visual_projection.weight",), shape[::-1], lambda weight: weight.T.contiguous())
    theirs = "image_encoder/vision_model." + _substitute(name, _CLIP_NAMES)
    if "{}" in theirs:  # open_clip keeps queries, keys and values in one matrix
        names = tuple(theirs.format(part) for part in "qkv")
        return Source(names, (shape[0] // 3, *shape[1:]), lambda *parts: torch.cat(parts))
    return Source((theirs,), shape)


# ---------------------------------------------------------------------------------------------- strict filling


def sources(module: nn.Module, source: Callable[..., Source], config: SVDConfig, prefix: str = "") -> dict[str, Source]:
    """Our tensors by name, each with its source. `prefix` names the network where `module` is one of the three."""
    return {key: source(prefix + key, tuple(tensor.shape), config) for key, tensor in module.state_dict().items()}


def check(wanted: dict[str, Source], shapes: dict[str, tuple[int, ...]], drops: Iterable[str], where: str) -> None:
    """Raises InputError unless a file of tensors `shapes` has all that is wanted, and otherwise only `drops` (prefixes)."""
    expected = {name: source.shape for source in wanted.values() for name in source.names}
    missing = sorted(expected.keys() - shapes.keys())
    unknown = sorted(name for name in shapes.keys() - expected.keys() if not name.startswith(tuple(drops)))
    wrong = [f"{n} {list(shapes[n])}, not {list(s)}" for n, s in expected.items() if shapes.get(n, s) != s]
    for problem, names in (("lacks", missing), ("holds unknown", unknown), ("has wrong shapes:", wrong)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise InputError(f"{where}: not Stable Video Diffusion as expected: {problem} {', '.join(names[:3])}{more}")


def fill(module: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Replaces the parameters of a module on the meta device, one by one, so that nothing is held twice."""
    for key, tensor in tensors:
        owner, _, name = key.rpartition(".")
        setattr(module.get_submodule(owner), name, nn.Parameter(tensor, requires_grad=False))


# ---------------------------------------------------------------------------------------------- reading files


class _Tensors:
    """The tensors of safetensors files, by mmap: {prefix: path} gives them the names prefix + their own.

    Raises InputError where a file is not of this format.
    """

    REOPEN_BYTES = 2**28  # pages read through a mapping count as this process's memory until it is closed

    def __init__(self, paths: dict[str, Path]):
        self.paths = paths
        self.metadata: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.files: dict[str, Path] = {}
        for prefix, path in paths.items():
            try:
                with safe_open(existing(path), framework="pt") as file:
                    self.metadata |= file.metadata() or {}
                    for name in file.keys():
                        self.files[prefix + name] = path
                        self.shapes[prefix + name] = tuple(file.get_slice(name).get_shape())
            except (SafetensorError, OSError) as error:
                raise InputError(f"{path}: not a complete safetensors file ({error})") from error

    def read(self, names: Iterable[tuple[str, ...]]) -> Iterator[list[Tensor]]:
        """The tensors of each tuple of names, views of the mapping where they stay as they are."""
        handles, read = {}, 0
        prefix_of = {path: prefix for prefix, path in self.paths.items()}
        for group in names:
            if read > self.REOPEN_BYTES:
                handles, read = {}, 0
            tensors = []
            for name in group:
                path = self.files[name]
                if path not in handles:
                    handles[path] = safe_open(path, framework="pt")
                tensors.append(handles[path].get_tensor(name.removeprefix(prefix_of[path])))
                read += tensors[-1].nbytes
            yield tensors


@dataclass(frozen=True)
class Checkpoint:
    """Weight files whose configuration is known and whose tensors are not yet read."""

    path: Path
    config: SVDConfig
    tensors: _Tensors


def find(model: str) -> Checkpoint:
    """The checkpoint of a name in MODELS, of a single file, or of a diffusers folder; see `locate`.

    Raises InputError where there is none, or none that can be read.
    """
    path, config = locate(model)
    tensors = _Tensors(_folder_paths(path) if path.is_dir() else {"": path})
    if "config" in tensors.metadata:
        try:
            config = from_json(tensors.metadata["config"])
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: the configuration in its metadata cannot be read ({error})") from error
    return Checkpoint(path, config, tensors)


def load(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> SVD:
    """The model on `device`, frozen: UNet and CLIP tower in `dtype`, the VAE in fp32.

    Raises InputError where the files do not hold exactly the tensors of the model.
    """
    path, config, tensors = checkpoint.path, checkpoint.config, checkpoint.tensors
    with torch.device("meta"):
        svd = SVD(config)
    made = {}
    if path.is_dir():
        wanted, drops = sources(svd, folder_source, config), ()
    else:
        wanted, drops = sources(svd, official_source, config), OFFICIAL_DROPS
        if not any(name.startswith("conditioner.embedders.3.encoder.encoder.") for name in tensors.shapes):
            wanted, made = _without_conditioner(wanted, config)
    check(wanted, tensors.shapes, drops, str(path))

    def ready() -> Iterator[tuple[str, Tensor]]:
        for (key, source), parts in zip(wanted.items(), tensors.read(s.names for s in wanted.values())):
            yield key, source.build(*parts).to(device, torch.float32 if key.startswith("vae.") else dtype)
        for key, tensor in made.items():
            yield key, tensor.to(device)

    fill(svd, ready())
    return svd.eval()


def _without_conditioner(wanted: dict[str, Source], config: SVDConfig) -> tuple[dict[str, Source], dict[str, Tensor]]:
    """Where the file lacks the conditioner's encoder, the first stage's serves. Its moments come straight from its
    last convolution, so our quant_conv becomes the identity."""
    moments = 2 * config.vae.z_channels
    made = {"vae.quant_conv.weight": torch.eye(moments)[:, :, None, None], "vae.quant_conv.bias": torch.zeros(moments)}
    old, new = "conditioner.embedders.3.encoder.encoder.", "first_stage_model.encoder."
    kept = {
        key: Source(tuple(name.replace(old, new) for name in source.names), source.shape, source.build)
        for key, source in wanted.items()
        if key not in made
    }
    return kept, made


# ---------------------------------------------------------------------------------------------- finding files


def locate(model: str, weights: Path = WEIGHTS) -> tuple[Path, SVDConfig]:
    """The file or folder of a model, and the sizes it has unless its metadata says otherwise.

    A name of MODELS is looked for in weights/, then in the hub's local cache, then downloaded. Anything else is a path.
    Raises InputError where there is nothing to be had.
    """
    if model in MODELS:
        return _local(model, weights) or _cached(model) or _download(model), MODELS[model]
    path = Path(model)
    if not path.exists():
        raise InputError(f"--model {model}: neither a model ({', '.join(MODELS)}) nor a file or folder")
    by_name = {SINGLE_FILES[name]: name for name in MODELS} | {Path(REPOSITORIES[name]).name: name for name in MODELS}
    return path, MODELS[by_name.get(path.resolve().name, "svd")]


def _local(model: str, weights: Path) -> Path | None:
    single, folder = weights / SINGLE_FILES[model], weights / Path(REPOSITORIES[model]).name
    return single if single.is_file() else folder if folder.is_dir() else None


def _folder_paths(folder: Path) -> dict[str, Path]:
    """The three files of a diffusers folder, at full precision where it has them all."""
    for variant in ("", ".fp16"):
        paths = {f"{part}/": folder / name.format(variant) for part, name in FOLDER_FILES.items()}
        if all(path.is_file() for path in paths.values()):
            return paths
    missing = [name.format("[.fp16]") for name in FOLDER_FILES.values()]
    raise InputError(f"{folder}: a diffusers folder of Stable Video Diffusion holds {', '.join(missing)}")


def _cached(model: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache  # imported where the hub is needed: a local file does without

    single = try_to_load_from_cache(REPOSITORIES[model], SINGLE_FILES[model])
    if isinstance(single, str):
        return Path(single)
    for variant in ("", ".fp16"):
        found = [try_to_load_from_cache(REPOSITORIES[model], name.format(variant)) for name in FOLDER_FILES.values()]
        if all(isinstance(path, str) for path in found):
            return Path(found[0]).parent.parent
    return None


def _download(model: str) -> Path:
    """Half precision in three files, 4.5 GB: the smallest official set. An interrupted download goes on where it stopped."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

    repository = REPOSITORIES[model]
    try:
        paths = [hf_hub_download(repository, name.format(".fp16")) for name in FOLDER_FILES.values()]
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        gated = isinstance(error, GatedRepoError) or status in (401, 403)
        raise InputError(
            f"{model}: {'the hub wants you to accept its licence' if gated else 'the hub cannot be reached'}:"
            f" accept it on https://huggingface.co/{repository}, run `hf auth login`, and try again;"
            f" or put {SINGLE_FILES[model]} from there into {WEIGHTS}"
        ) from error
    return Path(paths[0]).parent.parent
