"""Finds official weight files, or downloads them."""

from pathlib import Path

import torch

from minimti.config import MODELS, SVDConfig
from minimti.io.files import InputError, require_file

WEIGHTS = Path(__file__).resolve().parents[2] / "weights"

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
            require_file(path)
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


def folder_paths(folder: Path) -> dict[str, Path]:
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
