"""The results of sample.py: which are to be made, what they are called, and the record beside each.

The record of img_m.mp4 is img_m.mp4.json. It names all that the result depends on, so that a rerun keeps a result that
would come out the same, and makes any other again.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minimti.io.files import InputError, atomic_write, check_folder, check_target, check_writable, require_file
from minimti.io.write import check_frames

SUFFIXES = {"mp4": ".mp4", "gif": ".gif", "png": ""}  # ends of results' names, by --format; png is a folder of frames


@dataclass(frozen=True)
class Job:
    """One result to be made."""

    path: Path  # where the result goes
    motion: int | None  # index of the embedding; None: the image's own
    image: int | None  # index of the image; None: the motion alone
    seed: int
    label: str  # in a comparison

    @property
    def record(self) -> Path:
        """The file beside the result."""
        return record_of(self.path)

    @property
    def suffix(self) -> str:
        """The end of the result's name: .mp4, .gif, or "" for a folder of frames, whose name may hold any dots."""
        return suffix if (suffix := self.path.suffix.lower()) in SUFFIXES.values() else ""

    @property
    def attention(self) -> Path:
        """The picture of --attention."""
        name = self.path.stem if self.suffix else self.path.name
        return self.path.with_name(f"{name}_attention.png")


def plan(
    motions: Sequence[str],
    images: Sequence[str],
    seeds: Sequence[int],
    out: str,
    form: str,
    *,
    learned: bool,
    unconditional: bool = False,
    inputs: Sequence[str] = (),
) -> list[Job]:
    """A job for each motion, image and seed, in this order.

    motions        the embeddings' names, of which those of the results are made; the model's where there is none
    images         paths; none for the motion alone
    seeds          a seed is part of a name where there are several
    out            a folder, or the file of the only result
    form           "mp4", "gif" or "png"
    learned        whether the motions are embeddings
    unconditional  whether the results show the motion alone
    inputs         files that are read, besides the images

    Raises InputError where a result would replace another, an input, or anything that sample.py did not make, or cannot
    be written.
    """
    jobs, names = [], distinct(images)
    for m, motion in enumerate(motions):
        for i, image in enumerate(names or [None]):
            for seed in seeds:
                name = "_".join(part for part in (image, motion, "unconditional" * unconditional) if part)
                label = "motion alone" if image is None or (unconditional and learned) else image
                if len(motions) > 1:
                    label = f"{motion}: {label}"
                if len(seeds) > 1:
                    name, label = f"{name}_seed{seed}", f"{label}, seed {seed}"
                if form == "png" and Path(name).suffix.lower() in (".mp4", ".gif"):
                    name = f"{Path(name).stem}_{Path(name).suffix[1:]}"  # by its name a result is a video or a folder
                path = Path(out) / (name + SUFFIXES[form])
                jobs.append(Job(path, m if learned else None, None if image is None else i, seed, label))

    read = [*images, *inputs]
    suffix = Path(out).suffix.lower()
    if suffix in (".mp4", ".gif"):
        if suffix != SUFFIXES[form]:
            raise InputError(f"--out {out}: does not fit --format {form}; leave one of them out")
        if len(jobs) > 1:
            raise InputError(f"--out {out}: one file cannot hold {len(jobs)} videos; name a folder")
        job = replace(jobs[0], path=check_writable(out, *read))
        check_target(job.record, *read)
        _check_made(job)
        return [job]
    if os.path.isfile(out) or suffix in (".mov", ".webm", ".mkv", ".avi"):
        raise InputError(f"--out {out}: name a folder, or a file that ends in .mp4 or .gif")
    path, count = Counter(job.path for job in jobs).most_common(1)[0]
    if count > 1:
        same_images = len({*names}) < len(names)
        what = "images" if same_images else "embeddings" if len(set(motions)) < len(motions) else "pairs"
        raise InputError(f"{count} {what} of the same name would all become {path.name}; sample them apart")
    check_folder(out)
    for job in jobs:
        if form == "png":
            check_frames(job.path, *read)
        else:
            check_target(job.path, *read)
        check_target(job.record, *read)
        _check_made(job)
    return jobs


def _check_made(job: Job) -> None:
    """Raises InputError where something stands in a result's place, and no record is beside it or inside."""
    try:
        found = not job.path.exists() or job.record.is_file() or (job.suffix == ".mp4" and inner_record(job.path))
    except InputError:  # no video
        found = False
    if not found:
        raise InputError(f"{job.path}: was there before, and not made by sample.py; move it, or name another --out")


def distinct(paths: Sequence[str]) -> list[str]:
    """The names of files without folder and suffix; b_jpg and b_png where only the suffix tells them apart."""
    names, stems = [Path(path).name for path in paths], [Path(path).stem for path in paths]
    unlike = [stems.count(stem) > 1 and names.count(name) == 1 for name, stem in zip(names, stems)]
    return [stem + Path(name).suffix.replace(".", "_") * other for name, stem, other in zip(names, stems, unlike)]


def record_of(result: Path) -> Path:
    """The name of a result's record."""
    return result.with_name(f"{result.name}.json")


def is_made(job: Job, made_from: Mapping[str, Any]) -> bool:
    """Whether the result is there, unchanged, and its record names the same things as `made_from`."""
    try:
        record = read_record(job.record)
        same = record["made from"] == json.loads(json.dumps(made_from))
        return bool(same and record["sha256"] == digest(job.path))
    except (InputError, KeyError, OSError):
        return False


def has_attention(job: Job) -> bool:
    """Whether the picture of attention that the record of a job names is there, unchanged."""
    try:
        return bool(read_record(job.record)["attention"] == digest(job.attention))
    except (InputError, KeyError, OSError):
        return False


def is_attention(picture: Path) -> bool:
    """Whether a picture is the one of --attention for a result whose record is beside it."""
    result = picture.stem.removesuffix("_attention")
    beside = (record_of(picture.with_name(result + suffix)) for suffix in SUFFIXES.values())
    return result != picture.stem and any(record.is_file() for record in beside)


def remove_attention(job: Job) -> None:
    """Removes the picture of attention that the record of a job names, if it is unchanged."""
    if has_attention(job):
        with suppress(OSError):
            job.attention.unlink()


def write_record(job: Job, made_from: Mapping[str, Any], about: Mapping[str, Any], attention: bool = False) -> None:
    """Writes the record of a result that is there. Raises InputError where that fails.

    made_from  all that the result depends on
    about      what else there is to say about it
    attention  whether it has a picture of attention
    """
    pictures = {"attention": digest(job.attention)} if attention else {}
    text = json.dumps({"sha256": digest(job.path), **pictures, "made from": made_from, "about": about}, indent=1)
    with atomic_write(job.record) as part:
        part.write_text(text + "\n")


def read_record(path: Path) -> dict[str, Any]:
    """A record. Raises InputError where there is none, or the file is another."""
    record = _record_in(require_file(path).read_bytes())
    if record is None:
        raise InputError(f"{path}: is no record of a result that sample.py made")
    return record


def inner_record(path: Path) -> dict[str, Any] | None:
    """The record in the metadata of an mp4; None where there is none. Raises InputError where it is no video."""
    import av

    require_file(path)
    try:
        with av.open(f"file:{path}") as container:
            return _record_in(container.metadata.get("comment", ""))
    except av.FFmpegError as error:
        raise InputError(f"{path}: cannot be read as a video") from error
    except ValueError:  # texts that are not UTF-8
        return None


def _record_in(text: str | bytes) -> dict[str, Any] | None:
    """The record that a text holds; None where it is another text."""
    try:
        record = json.loads(text)
        return record if isinstance(record["made from"], dict) and isinstance(record["about"], dict) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def digest(path: str | Path) -> str:
    """A name for the contents of a file, or of the files in a folder (sha256, 32 of its digits)."""
    path, found = Path(path), hashlib.sha256()
    if path.is_dir():
        for file in sorted(path.iterdir()):
            found.update(f"{file.name} {digest(file)}\n".encode("utf-8", "surrogateescape"))
    else:
        with open(path, "rb") as stream:
            while block := stream.read(2**20):
                found.update(block)
    return found.hexdigest()[:32]


def short(fingerprint: Mapping[str, Sequence[float]]) -> str:
    """A fingerprint of weights as 12 digits. Two are equal where the weights are, in one precision on one machine."""
    return hashlib.sha256(json.dumps(fingerprint).encode()).hexdigest()[:12] if fingerprint else "unknown"


def flat(contents: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The entries of nested dicts, and what each holds, as texts."""
    for name, value in contents.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name} ")
        elif value not in (None, "", []):
            text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            yield f"{prefix}{name}", text
