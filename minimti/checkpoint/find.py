"""Finds weight files on this machine, or downloads official ones."""

import json
import os
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minimti.config import MODELS, SVDConfig, printable
from minimti.io.files import InputError, require_file

if TYPE_CHECKING:
    import torch

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
ANSWER_SECONDS = 4  # for the hub to answer at all, unless HF_HUB_ETAG_TIMEOUT gives another time


def locate(model: str, weights: Path = WEIGHTS, revision: str | None = None) -> tuple[Path, SVDConfig]:
    """The file or folder of a model, and the sizes it has unless its metadata gives others.

    `model` is a name of MODELS or a path. An official name is looked up in `weights`, then in the hub's local cache,
    then downloaded; `tiny` is in `weights` or in the installed package. A path gives the sizes of the official model
    with whose file or folder name its own begins, or in whose part of the hub's cache it is; a folder else those of svd
    or svd-xt, as its unet/config.json names the frames; anything else those of svd.

    `revision` is a commit, branch or tag of an official model's repository (default: main). With it `weights` is passed
    over, as the revision of a file there is unknown.

    Raises InputError where there is no such file and none can be downloaded, and for the revision of another model.
    """
    if model in REPOSITORIES:
        return here(model, weights, revision) or _download(model, revision), MODELS[model]
    if revision:
        raise InputError(f"--revision {revision}: only {', '.join(REPOSITORIES)} have revisions, not {model}")
    if model in MODELS:
        for folder in (weights, PACKAGE):
            if (path := folder / SINGLE_FILES[model]).is_file():
                return path, MODELS[model]
        raise InputError(f"{model}: {weights / SINGLE_FILES[model]} is not there; make it: python -m minimti.pretrain")
    path = Path(model)
    if not os.path.isdir(path):  # unlike Path.is_dir, no error for any name
        try:
            require_file(path)
        except InputError as error:
            known = ", ".join(MODELS)
            raise InputError(f"--model {error}; name one of {known}, a .safetensors file, or a folder") from error
    target = path.resolve()
    names = (path.name, target.name)  # a link and its target
    for official in reversed(REPOSITORIES):  # longest first: each name is a prefix of the next
        prefixes = (Path(SINGLE_FILES[official]).stem, Path(REPOSITORIES[official]).name)
        if any(name.startswith(prefixes) for name in names) or _cache_folder(REPOSITORIES[official]) in target.parts:
            return path, MODELS[official]
    return path, MODELS["svd-xt" if _frames_of(path) == MODELS["svd-xt"].num_frames else "svd"]


def _cache_folder(repository: str) -> str:
    """The name of a repository's folder in the hub's cache."""
    return f"models--{repository.replace('/', '--')}"


def _frames_of(folder: Path) -> int | None:
    """The number of frames that a diffusers folder names; None where it names none."""
    try:
        return json.loads((folder / "unet" / "config.json").read_bytes()).get("num_frames")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def automatic(device: "torch.device", weights: Path = WEIGHTS) -> str:
    """The model of `--model auto`.

    The first official one whose files are here, in `weights` or in the hub's local cache; without any, svd (which
    `locate` then downloads) on cuda, else `tiny`. Warns where the cache cannot be read.
    """
    for model in REPOSITORIES:
        try:
            if here(model, weights):
                return model
        except InputError as error:
            warnings.warn(str(error), stacklevel=2)
    return "svd" if device.type == "cuda" else "tiny"


def here(model: str, weights: Path = WEIGHTS, revision: str | None = None) -> Path | None:
    """The file or folder of an official model on this machine, as `locate` finds it. Raises InputError as it does."""
    return (None if revision else _local(model, weights)) or _cached(model, revision)


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


def revision_of(path: Path) -> str | None:
    """The commit of a file or folder in the hub's local cache; None for a path elsewhere."""
    match = re.search(r"/models--[^/]+/snapshots/([^/]+)", path.absolute().as_posix())
    return match and match[1]


def _hub() -> Any:
    """The library, imported here because a local file does not need it. Raises InputError where it does not start."""
    try:
        import huggingface_hub
        import huggingface_hub.constants  # reads the environment
        import huggingface_hub.utils.logging

        return huggingface_hub
    except Exception as error:  # such as the ValueError of int() for a timeout
        names = ", ".join(sorted(name for name in os.environ if name.startswith("HF_")))
        raise InputError(f"huggingface_hub does not start ({_reason(error)}); check the variables {names}") from error


def _cached(model: str, revision: str | None) -> Path | None:
    """The single file, or the folder of three, in the hub's local cache. Raises InputError where it cannot be read."""
    hub = _hub()
    repository = REPOSITORIES[model]

    def found(name: str) -> Path | None:
        path = hub.try_to_load_from_cache(repository, name, revision=revision)
        return Path(path) if isinstance(path, str) else None

    try:
        if single := found(SINGLE_FILES[model]):
            return single
        for variant in ("", ".fp16"):
            paths = [path for name in FOLDER_FILES.values() if (path := found(name.format(variant)))]
            if len(paths) == len(FOLDER_FILES):
                return paths[0].parent.parent
    except (OSError, ValueError) as error:  # UnicodeDecodeError is one
        entry = Path(hub.constants.HF_HUB_CACHE) / _cache_folder(repository)
        raise InputError(f"{entry}: broken ({_reason(error)}); delete it, and it is downloaded again") from error
    return None


def _download(model: str, revision: str | None) -> Path:
    """Half precision in three files, 4.5 GB: the smallest official set. The library resumes a broken transfer."""
    hub = _hub()
    hub.utils.logging.set_verbosity_error()  # it would print a line for every retry
    repository, names = REPOSITORIES[model], [name.format(".fp16") for name in FOLDER_FILES.values()]
    seconds = hub.constants.HF_HUB_ETAG_TIMEOUT if "HF_HUB_ETAG_TIMEOUT" in os.environ else ANSWER_SECONDS
    try:
        # One request without the library's retries, which take half a minute, tells whether the hub can be reached.
        hub.get_hf_file_metadata(hub.hf_hub_url(repository, names[0], revision=revision), timeout=seconds)
        paths = [Path(hub.hf_hub_download(repository, name, revision=revision)) for name in names]
    except Exception as error:  # the library's own, those of whichever HTTP client it uses, and those of the disk
        status = getattr(getattr(error, "response", None), "status_code", None)
        place = f"https://huggingface.co/{repository}"
        if status in (401, 403):
            what = f"no access: accept the licence on {place}, run `hf auth login`, and try again"
        elif status == 404:
            what = f"its repository has no revision {revision or 'main'} with {names[0]}"
        elif isinstance(error, OSError) and error.errno and error.filename:
            what = f"the cache {hub.constants.HF_HUB_CACHE} cannot be written ({error.strerror}); name another: HF_HOME"
        else:
            what = f"the download from {hub.constants.ENDPOINT} failed ({_reason(error)})"
        raise InputError(f"{model}: {what}; or put {SINGLE_FILES[model]} from {place} into {WEIGHTS}/") from error
    folders = {path.parent.parent for path in paths}
    if len(folders) > 1:
        raise InputError(f"{model}: its repository changed during the download; run the same command again")
    return folders.pop()


def _reason(error: Exception) -> str:
    """The first 300 characters of an error as one line, without the access token that headers hold."""
    cause = error.__cause__ or error  # the library says that something failed, its cause what
    text = " ".join(f"{type(cause).__name__}: {cause}".split())
    return printable(re.sub(r"hf_\w+|Bearer \S+", "***", text), 300)
