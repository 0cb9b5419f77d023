"""Official weight files: find them, or download them, and load them strictly."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minimti.config import MODELS, SVDConfig, from_json
from minimti.files import InputError, existing
from minimti.layouts import OFFICIAL_DROPS, Source, folder_source, official_source
from minimti.svd import SVD

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"

REPOSITORIES = {
    "svd": "stabilityai/stable-video-diffusion-img2vid",
    "svd-xt": "stabilityai/stable-video-diffusion-img2vid-xt",
}
# `tiny` is made, not downloaded, and has no folder in the other layout.
SINGLE_FILES = {"svd": "svd.safetensors", "svd-xt": "svd_xt.safetensors", "tiny": "tiny/tiny.safetensors"}
FOLDER_FILES = {
    "unet": "unet/diffusion_pytorch_model{}.safetensors",
    "vae": "vae/diffusion_pytorch_model{}.safetensors",
    "image_encoder": "image_encoder/model{}.safetensors",
}


# ---------------------------------------------------------------------------------------------- strict filling


def sources(module: nn.Module, source: Callable[..., Source], config: SVDConfig, prefix: str = "") -> dict[str, Source]:
    """Our tensors by name, each with its source. `prefix` names the network where `module` is one of the three."""
    return {key: source(prefix + key, tuple(tensor.shape), config) for key, tensor in module.state_dict().items()}


def check(wanted: dict[str, Source], shapes: dict[str, tuple[int, ...]], drops: Iterable[str], where: str) -> None:
    """Raises InputError unless tensors of `shapes` are all those wanted, and beside it only `drops` (prefixes)."""
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


def layout(tensor: Tensor) -> torch.memory_format:
    """For the weight of a convolution, channels innermost: its output inherits that, down to the last layer, and then
    no transformer and no layer over time has to copy its input."""
    return torch.channels_last if tensor.ndim == 4 else torch.preserve_format


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


def load(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, vae_dtype: torch.dtype = torch.float32
) -> SVD:
    """The model on `device`, frozen: UNet and CLIP tower in `dtype`, the VAE in `vae_dtype`.

    Raises InputError where the files do not hold exactly the tensors of the model.
    """
    path, config, tensors = checkpoint.path, checkpoint.config, checkpoint.tensors
    try:
        with torch.device("meta"):
            svd = SVD(config)
    except Exception as error:  # of whichever layer its numbers do not suit
        raise InputError(f"{path}: the configuration in its metadata describes no network ({error})") from error
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
            tensor, kind = source.build(*parts), vae_dtype if key.startswith("vae.") else dtype
            # A copy even where nothing changes: a view would keep its part of the file in memory.
            yield key, tensor.to(device, kind, copy=True, memory_format=layout(tensor))
        for key, tensor in made.items():
            yield key, tensor.to(device, vae_dtype)

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

    A name of MODELS is looked for in weights/; an official one then in the hub's local cache, then downloaded. Anything
    else is a path.
    Raises InputError where there is nothing to be had.
    """
    if model in REPOSITORIES:
        return _local(model, weights) or _cached(model) or _download(model), MODELS[model]
    if model in MODELS:
        if (path := weights / SINGLE_FILES[model]).is_file():
            return path, MODELS[model]
        raise InputError(f"{model}: {path} is not there; make it: python -m minimti.pretrain")
    path = Path(model)
    if not path.is_dir():
        try:
            existing(path)
        except InputError as error:
            names = ", ".join(MODELS)
            raise InputError(f"--model {error}; name one of {names}, a .safetensors file, or a folder") from error
    # The two models have the same sizes and differ in how many frames they make.
    names = (path.name, path.resolve().name)
    of_xt = any(name.startswith(("svd_xt", Path(REPOSITORIES["svd-xt"]).name)) for name in names)
    return path, MODELS["svd-xt" if of_xt else "svd"]


def automatic(device: torch.device, weights: Path = WEIGHTS) -> str:
    """The model of `--model auto`: an official one that lies here, or for whose download a GPU waits; else `tiny`."""
    for model in REPOSITORIES:
        if _local(model, weights) or _cached(model):
            return model
    return "tiny" if device.type == "cpu" else "svd"


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
    """Half precision in three files, 4.5 GB: the smallest official set. The library resumes what was interrupted."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils.logging import set_verbosity_error

    set_verbosity_error()  # of every attempt it makes, a line
    repository = REPOSITORIES[model]
    try:
        paths = [hf_hub_download(repository, name.format(".fp16")) for name in FOLDER_FILES.values()]
    except Exception as error:  # its own errors, those of whichever HTTP client it has, and those of the disk
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:100]
        what = "wants its licence accepted" if status in (401, 403) else f"gave no files ({reason})"
        raise InputError(
            f"{model}: the hub {what}: accept the licence on https://huggingface.co/{repository},"
            f" run `hf auth login`, and try again; or put {SINGLE_FILES[model]} from there into {WEIGHTS}"
        ) from error
    return Path(paths[0]).parent.parent
