"""Reads official weight files and fills a module with them, strictly.

Every tensor of a file is used or is listed in OFFICIAL_DROPS; a missing, unknown or differently shaped one is an error
that names it. Those of the image encoder are passed over where the model has none. The caller builds the module, on the
meta device, so no weight is initialised before it is replaced.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minimti.checkpoint.find import REPOSITORIES, folder_paths, here, locate, revision_of
from minimti.checkpoint.key_maps import (
    FOLDER_IMAGE_ENCODER,
    OFFICIAL_DROPS,
    OFFICIAL_IMAGE_ENCODER,
    Source,
    folder_source,
    official_source,
)
from minimti.config import MODELS, SVDConfig, from_json, printable
from minimti.io.files import InputError, require_file

if TYPE_CHECKING:
    from minimti.svd import SVD

# ---------------------------------------------------------------------------------------------- strict filling


def sources(module: nn.Module, source: Callable[..., Source], config: SVDConfig, prefix: str = "") -> dict[str, Source]:
    """The tensors of a module by their names in it, each with its source in a weight file.

    `source` is `official_source` or `folder_source`. `prefix` is "unet.", "vae." or "image_encoder." where `module` is
    one of the three networks, and empty where it is the whole SVD.
    """
    return {key: source(prefix + key, tuple(tensor.shape), config) for key, tensor in module.state_dict().items()}


def check(needed: dict[str, Source], shapes: dict[str, tuple[int, ...]], drops: Iterable[str], where: str) -> None:
    """Compares the tensors that a module needs with those that a file has.

    needed  from `sources`
    shapes  of the file's tensors by name
    drops   prefixes of the names that the file may have in addition
    where   the file, for the message

    Raises InputError, naming up to three tensors, where some are missing, unknown or of other shapes.
    """
    expected = {name: source.shape for source in needed.values() for name in source.names}
    missing = sorted(expected.keys() - shapes.keys())
    unknown = sorted(name for name in shapes.keys() - expected.keys() if not name.startswith(tuple(drops)))
    wrong = [f"{n} {list(shapes[n])}, not {list(s)}" for n, s in expected.items() if shapes.get(n, s) != s]
    for problem, names in (("lacks", missing), ("holds unknown", unknown), ("has wrong shapes:", wrong)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            first = ", ".join(printable(name, 200) for name in names[:3])
            raise InputError(f"{where}: not Stable Video Diffusion as expected: {problem} {first}{more}")


def fill(module: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Replaces the parameters of a module by name, frozen.

    It takes the tensors one by one, so a generator that reads them from a file keeps none in memory twice.
    """
    for key, tensor in tensors:
        owner, _, name = key.rpartition(".")
        setattr(module.get_submodule(owner), name, nn.Parameter(tensor, requires_grad=False))


def memory_format(tensor: Tensor) -> torch.memory_format:
    """The layout in which a weight is stored: channels last for 2D convolutions, unchanged for anything else.

    The output of a convolution inherits the layout, through all layers, and then no transformer and no layer over time
    has to copy its input.
    """
    return torch.channels_last if tensor.ndim == 4 else torch.preserve_format


# ---------------------------------------------------------------------------------------------- reading files


class _Tensors:
    """The tensors of safetensors files, read by mmap.

    `paths` maps a prefix to each file; a tensor's name is this prefix and its name in the file. Raises InputError where
    a file is missing or not in this format.
    """

    MAX_HEADER = 2**24  # bytes: names, shapes and metadata, of which official files have 0.3 MB
    REOPEN_BYTES = 2**28  # pages read through a mapping count as this process's memory until the mapping is closed

    def __init__(self, paths: dict[str, Path]):
        self.paths = paths
        self.metadata: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.files: dict[str, Path] = {}
        for prefix, path in paths.items():
            try:
                with open(require_file(path), "rb") as raw:
                    if int.from_bytes(raw.read(8), "little") > self.MAX_HEADER:
                        raise SafetensorError("its header is too long")
                with safe_open(path, framework="pt") as file:
                    self.metadata |= file.metadata() or {}
                    for name in file.keys():
                        tensor = file.get_slice(name)
                        self.files[prefix + name] = path
                        self.shapes[prefix + name] = tuple(tensor.get_shape())
                        self.dtypes[prefix + name] = tensor.get_dtype()
            except (SafetensorError, OSError) as error:
                again = "; delete it, and it is downloaded again" if revision_of(path) else ""
                raise InputError(
                    f"{path}: not a complete safetensors file ({printable(str(error), 200)}){again}"
                ) from error

    def read(self, names: Iterable[tuple[str, ...]]) -> Iterator[list[Tensor]]:
        """The tensors of each tuple of names, as views of the mapping: keep none of them without a copy."""
        handles: dict[Path, safe_open] = {}
        read = 0
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

    @property
    def revision(self) -> str | None:
        """The commit of files in the cache of huggingface_hub; None for others."""
        return revision_of(self.path)


def open_checkpoint(model: str, revision: str | None = None) -> Checkpoint:
    """The checkpoint of a name in MODELS, of a single file, or of a diffusers folder; see `find.locate`.

    Its configuration is the one in the file's metadata, else that of the official model. Raises InputError where there
    is no such file or it cannot be read.
    """
    path, config = locate(model, revision=revision)
    tensors = _Tensors(folder_paths(path) if path.is_dir() else {"": path})
    if "config" in tensors.metadata:
        try:
            config = from_json(tensors.metadata["config"])
        except (ValueError, TypeError) as error:
            raise InputError(
                f"{path}: the configuration in its metadata cannot be read ({printable(str(error), 300)})"
            ) from error
    return Checkpoint(path, config, tensors)


def configuration(model: str, revision: str | None = None) -> SVDConfig:
    """The configuration that `open_checkpoint` finds; for an official model that is not on this machine, its own.

    Nothing is downloaded. Raises InputError as `open_checkpoint` does.
    """
    is_here = model not in REPOSITORIES or here(model, revision=revision)
    return open_checkpoint(model, revision).config if is_here else MODELS[model]


def load_into(
    svd: "SVD",
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
) -> None:
    """Fills an SVD that is on the meta device, and leaves it frozen, in evaluation mode, on `device`.

    UNet and image encoder get `dtype`, the VAE gets `vae_dtype`. Raises InputError where the files do not hold exactly
    the tensors of the model; of the image encoder only where the model has one (its file in a folder is needed anyway).
    """
    path, config, tensors = checkpoint.path, checkpoint.config, checkpoint.tensors
    made: dict[str, Tensor] = {}
    if path.is_dir():
        needed, drops, unused = sources(svd, folder_source, config), [], FOLDER_IMAGE_ENCODER
    else:
        needed, drops, unused = sources(svd, official_source, config), [*OFFICIAL_DROPS], OFFICIAL_IMAGE_ENCODER
        if not any(name.startswith("conditioner.embedders.3.encoder.encoder.") for name in tensors.shapes):
            needed, made = _without_conditioner(needed, config)
    if not svd.has_image_encoder:
        drops.append(unused)
    check(needed, tensors.shapes, drops, str(path))
    for name in {name for source in needed.values() for name in source.names}:
        if tensors.dtypes[name] not in ("F64", "F32", "F16", "BF16"):
            raise InputError(f"{path}: {name} is {tensors.dtypes[name]}, not a floating-point weight")

    def ready() -> Iterator[tuple[str, Tensor]]:
        for (key, source), parts in zip(needed.items(), tensors.read(s.names for s in needed.values())):
            tensor, kind = source.build(*parts), vae_dtype if key.startswith("vae.") else dtype
            if device.type == "cuda":  # PyTorch would convert and rearrange on the CPU
                tensor = tensor.to(device)
            # A copy even where device and dtype are the same: a view would keep its part of the file in memory.
            yield key, tensor.to(device, kind, copy=True, memory_format=memory_format(tensor))
        for key, tensor in made.items():
            yield key, tensor.to(device, vae_dtype)

    fill(svd, ready())
    svd.eval()


def _without_conditioner(needed: dict[str, Source], config: SVDConfig) -> tuple[dict[str, Source], dict[str, Tensor]]:
    """The sources, and tensors that are made instead, for a file without the encoder of its conditioner.

    The encoder of its first stage is used in its place. That one has no quant_conv: its moments are the output of its
    last convolution, so our quant_conv becomes the identity.
    """
    moments = 2 * config.vae.z_channels
    made = {"vae.quant_conv.weight": torch.eye(moments)[:, :, None, None], "vae.quant_conv.bias": torch.zeros(moments)}
    old, new = "conditioner.embedders.3.encoder.encoder.", "first_stage_model.encoder."
    kept = {
        key: Source(tuple(name.replace(old, new) for name in source.names), source.shape, source.build)
        for key, source in needed.items()
        if key not in made
    }
    return kept, made
