"""Finds weight files on this machine, or downloads official ones."""

from pathlib import Path

import torch

from minimti.config import MODELS, SVDConfig
from minimti.io.files import InputError, require_file

PACKAGE = Path(__file__).resolve().parents[1]
# A wheel carries the embedded model in the package, and official weights are in the user's folder then (this path is
# relative on purpose); a checkout has both in its weights/.
WEIGHTS = Path("weights") if (PACKAGE / "tiny").is_dir() else PACKAGE.parent / "weights"

REPOSITORIES = {
    "svd": "stabilityai/stable-video-diffusion-img2vid",
    "svd-xt": "stabilityai/stable-video-diffusion-img2vid-xt",
    "svd-xt-1-1": "stabilityai/stable-video-diffusion-img2vid-xt-1-1",
}
SINGLE_FILES = {
    "svd": "svd.safetensors",
    "svd-xt": "svd_xt.safetensors",
    "svd-xt-1-1": "svd_xt_1_1.safetensors",
    "tiny": "tiny/tiny.safetensors",  # the embedded model, in this repository only
}
FOLDER_FILES = {
    "unet": "unet/diffusion_pytorch_model{}.safetensors",
    "vae": "vae/diffusion_pytorch_model{}.safetensors",
    "image_encoder": "image_encoder/model{}.safetensors",
}


def locate(model: str, weights: Path = WEIGHTS) -> tuple[Path, SVDConfig]:
    """The file or folder of a model, and the sizes it has unless its metadata gives others.

    `model` is a name of MODELS or a path. An official name is looked up in `weights`, then in the hub's local cache,
    then downloaded; `tiny` is in `weights` or in the installed package. A path gives the sizes of the official model
    with whose file or folder name it begins, else those of svd.

    Raises InputError where there is no such file and none can be downloaded.
    """
    if model in REPOSITORIES:
        return _local(model, weights) or _cached(model) or _download(model), MODELS[model]
    if model in MODELS:
        for folder in (weights, PACKAGE):
            if (path := folder / SINGLE_FILES[model]).is_file():
                return path, MODELS[model]
        raise InputError(f"{model}: {weights / SINGLE_FILES[model]} is not there; make it: python -m minimti.pretrain")
    path = Path(model)
    if not path.is_dir():
        try:
            require_file(path)
        except InputError as error:
            known = ", ".join(MODELS)
            raise InputError(f"--model {error}; name one of {known}, a .safetensors file, or a folder") from error
    names = (path.name, path.resolve().name)  # a link and its target
    for official in reversed(REPOSITORIES):  # the longest first, as each name begins the next one
        prefixes = (Path(SINGLE_FILES[official]).stem, Path(REPOSITORIES[official]).name)
        if any(name.startswith(prefixes) for name in names):
            return path, MODELS[official]
    return path, MODELS["svd"]


def automatic(device: torch.device, weights: Path = WEIGHTS) -> str:
    """The model of `--model auto`.

    The first official one whose files are here, in `weights` or in the hub's local cache; without any, svd (which
    `locate` then downloads) on cuda, else `tiny`.
    """
    for model in REPOSITORIES:
        if _local(model, weights) or _cached(model):
            return model
    return "svd" if device.type == "cuda" else "tiny"


def _local(model: str, weights: Path) -> Path | None:
    single, folder = weights / SINGLE_FILES[model], weights / Path(REPOSITORIES[model]).name
    return single if single.is_file() else folder if folder.is_dir() else None


def folder_paths(folder: Path) -> dict[str, Path]:
    """The three files of a diffusers folder by the prefix of their tensors' names: "unet/", "vae/", "image_encoder/".

    Full precision where all three have it, else half. Raises InputError where neither set is complete.
    """
    for variant in ("", ".fp16"):
        paths = {f"{part}/": folder / name.format(variant) for part, name in FOLDER_FILES.items()}
        if all(path.is_file() for path in paths.values()):
            return paths
    missing = [name.format("[.fp16]") for name in FOLDER_FILES.values()]
    raise InputError(f"{folder}: a diffusers folder of Stable Video Diffusion holds {', '.join(missing)}")


def _cached(model: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache  # here because a local file does not need the library

    single = try_to_load_from_cache(REPOSITORIES[model], SINGLE_FILES[model])
    if isinstance(single, str):
        return Path(single)
    for variant in ("", ".fp16"):
        found = [try_to_load_from_cache(REPOSITORIES[model], name.format(variant)) for name in FOLDER_FILES.values()]
        paths = [Path(path) for path in found if isinstance(path, str)]
        if len(paths) == len(FOLDER_FILES):
            return paths[0].parent.parent
    return None


def _download(model: str) -> Path:
    """Half precision in three files, 4.5 GB: the smallest official set. The library resumes an interrupted download."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils.logging import set_verbosity_error

    set_verbosity_error()  # it would print a line for every retry
    repository = REPOSITORIES[model]
    try:
        paths = [hf_hub_download(repository, name.format(".fp16")) for name in FOLDER_FILES.values()]
    except Exception as error:  # the library's own, those of whichever HTTP client it uses, and those of the disk
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:100]
        what = "its licence has not been accepted" if status in (401, 403) else f"the download failed ({reason})"
        raise InputError(
            f"{model}: {what}: accept the licence on https://huggingface.co/{repository},"
            f" run `hf auth login`, and try again; or put {SINGLE_FILES[model]} from there into {WEIGHTS}/"
        ) from error
    return Path(paths[0]).parent.parent
