"""The folder of a run, m.run/ beside the embedding m.pt: what the run was asked for, how far it is, what to look at.

settings.json     the command, and all that the tokens depend on
log.jsonl         a line for each step
state.pt          tokens and optimiser: where --resume goes on
views.pt          the encoded views of the clip
frames/           the frames that are learned, of the first clip, for `python -m minimti.score`
clip.png          a strip of them, a row for each clip
loss.png          the loss over the steps
preview-00100.mp4 the clip, and beside it what the tokens of a step make of its first frame (--preview)
lock              held by the process that trains
"""

import errno
import hashlib
import io
import json
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as T

from minimti import __version__
from minimti.checkpoint.fingerprint import differs
from minimti.config import SVDConfig, printable
from minimti.invert import State, View
from minimti.io.files import MAX_NAME, InputError, atomic_write, make_folder
from minimti.io.pictures import find_pictures
from minimti.io.pixels import to_uint8
from minimti.io.video import Clip, read_clip
from minimti.io.write import enlarged, write_clip, write_frames, write_strip
from minimti.motion import Motion
from minimti.pipeline import Progress, animate
from minimti.ranks import ALONE, Ranks
from minimti.svd import SVD, Conditioning

SMOOTHED = 50  # losses in the mean that the curve shows
DRAW_SECONDS = 60  # at least so long between two drawings of the curve while training: one takes half a second
STRIP_HEIGHT = 128  # pixels: the height of a frame in clip.png, at most


class NothingLeft(InputError):
    """The run has taken all of its steps."""


class Run:
    """The run of an embedding: an object to be called with each Progress of `learn`.

    Within a `with` block no other process can hold the run of the same folder.
    """

    def __init__(self, out: str | Path, save_every: int):
        self.out, self.save_every = Path(out), save_every
        self.folder = folder_of(self.out)
        self.legs: list[int] = []  # steps of each schedule of the rate: [500]; [500, 200] where 200 were added
        self.adds = False  # whether the last schedule follows a finished run
        self.crop = False  # whether the views of a resumed run are cropped
        self.done: int | None = None  # steps of the embedding, once it is there
        self.saved, self.saved_views = -1, 0  # the step of state.pt, the number of views in views.pt
        self.log: list[dict[str, float]] = []  # the lines of log.jsonl
        self.written = 0  # how many of them are in the file
        self.began = self.drawn = time.perf_counter()
        self.last: Progress | None = None  # in stage "learn"
        self._locks: list[IO] = []

    def __enter__(self) -> "Run":
        if len(os.fsencode(self.folder.name)) > MAX_NAME - 8:  # an earlier one is renamed m-1.run
            raise InputError(f"{self.out}: cannot be written (the name is too long for that of its run, m.run)")
        if self.folder.is_file():
            raise InputError(f"--out {self.out}: its run needs a folder called {self.folder}; name it otherwise")
        if self.folder.exists():
            self._lock()
        return self

    def __exit__(self, *_: Any) -> None:
        for lock in self._locks:
            lock.close()

    @property
    def steps(self) -> int:
        """All steps of the run, those of earlier schedules too."""
        return sum(self.legs)

    @property
    def is_begun(self) -> bool:
        """Whether its settings are there."""
        return self.path("settings.json").is_file()

    @property
    def is_done(self) -> bool:
        """Whether the embedding is there, after all steps."""
        return self.done == self.steps

    def path(self, name: str) -> Path:
        """A file of the folder."""
        return self.folder / name

    # ------------------------------------------------------------------------------------------------ begin, resume

    def make_way(self) -> list[str]:
        """Renames an embedding or a run that stands there; returns what to print about it.

        From here on the folder is there, and held.
        """
        if not self._locks:
            self._lock()
        new_out, new_folder = _free(self.out)
        moved: list[str] = []
        if self.is_begun:
            moved += _rename(self.folder, new_folder)
            self._lock()
        return _rename(self.out, new_out) + moved

    def keep(self) -> None:
        """Raises NothingLeft where a finished embedding stands there without its run."""
        if self.is_begun or not self.out.is_file():
            return
        try:
            motion = Motion.load(self.out)
        except InputError:  # no embedding
            return
        if not motion.unfinished:
            self.legs, self.done = [motion.steps], motion.steps
            raise NothingLeft(f"{self.out}: has taken its {motion.steps} steps")

    def begin(self, settings: dict[str, Any], weights: dict[str, list[float]], steps: int, command: str) -> None:
        """A new run, after `make_way`."""
        self.legs = [steps]
        self._write_settings({"settings": settings, "weights": weights, "command": command})

    def find(self, settings: dict[str, Any], steps: int | None, device: torch.device) -> State | None:
        """The state to go on from; None where the run was stopped before all views were encoded. Writes nothing.

        `steps` is the number asked for: None or that of the run, or more where the run is finished.
        Raises InputError where there is no run, or it was begun with other settings, NothingLeft where it is finished.
        """
        if not self.is_begun:
            raise InputError(f"{self.folder}: no run to resume; leave --resume out to begin one")
        try:
            found = json.loads(self.path("settings.json").read_text())
            self.legs, self.weights = [int(leg) for leg in found["steps"]], found["weights"]
            differs(self.weights, self.weights)  # raises where they are no fingerprint
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about other kinds of file; the InputError is enough
                state = self._load(device) if self.path("state.pt").is_file() else None
            # Up to version 0.3.0 a run had one process. Up to 0.4.0 all views were cropped, and stay so.
            begun = {"ranks": 1, "crop": settings.get("crop")} | found["settings"]
            self.crop = bool(found["settings"].get("crop", True))
            differing = [name for name in settings if begun.get(name) != settings[name]]
            command = str(found["command"])
        except Exception as error:  # a damaged file can make the unpickler raise anything
            raise InputError(f"{self.folder}: its files are damaged; delete this folder to begin again") from error
        if differing:
            name = min(differing, key=lambda name: (name != "model", name != "optimizer"))  # others follow from these
            if name == "model" and "--model" not in command:  # then its choice depends on what is on this machine
                command += f" --model {begun.get(name)}"
            advice = f"to go on with it: {command} --resume" if len(self.legs) == 1 else "give what it was begun with"
            raise InputError(f"{self.folder}: was begun {_how(name, begun.get(name))}; {advice}")
        done = state.steps if state else 0
        if state is None and (len(self.legs) > 1 or self.out.exists()):
            raise InputError(f"{self.folder}: its state.pt is missing; leave --resume out to begin again")
        if done < self.steps and steps not in (None, self.steps):
            raise InputError(f"{self.folder}: is at {done} of {self.steps} steps; finish them first, without --steps")
        added = (steps or 0) - done if done == self.steps else 0
        self.adds = added > 0
        if done == self.steps and not self.adds and self.out.exists():
            self.done = done
            advice = f"--steps {done + max(self.legs[0] // 2, 1)}"
            raise NothingLeft(f"{self.folder}: has taken its {self.text(done)} steps; {advice}, say, takes more")
        if self.adds:
            self.legs.append(added)
        if state:
            state.begun = sum(self.legs[:-1])
        return state

    def resume(self, state: State | None, weights: dict[str, list[float]]) -> list[str]:
        """Goes on with the run that `find` found; returns what to print. Raises InputError for other weights."""
        if differs(weights, self.weights):
            raise InputError(f"{self.folder}: was made with other weights of this model")
        if state is None:
            return []
        said: list[str] = []
        if self.adds:
            said += _rename(self.out, _free(self.out)[0])
            self._write_settings(json.loads(self.path("settings.json").read_text()))
        self.saved = state.steps
        self.log = [entry for entry in _entries(self.path("log.jsonl")) if entry["step"] <= state.steps]
        return [*said, f"run        {self.folder}: goes on after {state.steps} steps"]

    def text(self, done: int) -> str:
        """Steps in words: 500, or 312 of 500, or 500 + 200."""
        planned = " + ".join(map(str, self.legs))
        return planned if done == self.steps else f"{done} of {planned}"

    def _write_settings(self, contents: dict[str, Any]) -> None:
        text = json.dumps({**contents, "version": __version__, "steps": self.legs}, indent=1)
        with atomic_write(self.path("settings.json")) as part:
            part.write_text(text)

    def _lock(self) -> None:
        """Makes the folder where there is none, and holds its lock until this process ends."""
        try:
            import fcntl
        except ImportError:  # Windows: nothing keeps a second process away
            return make_folder(self.folder)
        while True:
            make_folder(self.folder)
            try:
                lock = open(self.path("lock"), "a")
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(lock.fileno()), os.stat(self.path("lock"))):
                    return self._locks.append(lock)
            except BlockingIOError as error:
                raise InputError(f"{self.folder}: another process is training there; name another --out") from error
            except FileNotFoundError:  # another process renamed or removed the folder in between
                pass
            except OSError as error:
                if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP):  # some network drives have no locks
                    return None
                raise InputError(f"{self.folder}: cannot be locked ({error.strerror})") from error

    # ------------------------------------------------------------------------------------------------------ progress

    def __call__(self, progress: Progress) -> None:
        """Logs the step, and saves where it is time to."""
        if progress.stage != "learn" or progress.motion is None:
            return
        self.last = progress
        if progress.loss is None:  # before the first step
            self.began = time.perf_counter() - (self.log[-1]["seconds"] if self.log else 0)
        else:
            seconds = round(time.perf_counter() - self.began, 3)
            self.log.append({"step": progress.step, "loss": progress.loss, "seconds": seconds})
        # on a GPU losses arrive some steps late; at the end the embedding comes first: `finish`
        due = progress.step >= self.saved + self.save_every and progress.is_settled and progress.step < progress.steps
        if due or progress.loss is None:
            self.save()
            if time.perf_counter() - self.drawn > DRAW_SECONDS:
                self.draw()

    def save(self) -> None:
        """Writes the log and, where steps have been taken since, the state. Raises OSError where there is no space."""
        assert self.last is not None and self.last.state is not None
        state = self.last.state()
        with self._explained():
            if len(state.views) > self.saved_views:
                _save([(x0, cond.concat[:, :1], cond.micro) for x0, cond in state.views], self.path("views.pt"))
                self.saved_views = len(state.views)
            if state.steps > self.saved:
                fields = {"tokens": state.tokens, "optimizer": state.optimizer, "steps": state.steps}
                _save(fields, self.path("state.pt"))
                self.saved = state.steps
            self._write_log()

    def finish(self, motion: Motion) -> None:
        """Saves all: state, embedding, curve. Raises OSError where there is no space."""
        with self._explained():
            motion.save(self.out)
        self.done = motion.steps
        self.save()
        self.draw()
        self.last = None  # it holds all views, on the device

    def draw(self) -> None:
        """Draws loss.png."""
        if self.log:
            with self._explained(), atomic_write(self.path("loss.png")) as part:
                draw_losses(part, self.log, self.legs, self.folder.name)
        self.drawn = time.perf_counter()

    def show_clips(self, clips: Sequence[Clip]) -> None:
        """Keeps the frames of the first clip, and draws clip.png, a row for each; all have one size and length."""
        with self._explained():
            if not self.path("frames").is_dir():  # a resumed run has them
                write_frames(self.path("frames"), to_uint8(clips[0].frames))
            write_strip(self.path("clip.png"), strip_of([clip.frames for clip in clips], STRIP_HEIGHT))

    def _write_log(self) -> None:
        if self.written == 0:  # a resumed run may have logged steps that it takes again
            with atomic_write(self.path("log.jsonl")) as part:
                part.write_text(_lines(self.log))
        else:
            with open(self.path("log.jsonl"), "a") as file:
                file.write(_lines(self.log[self.written :]))
        self.written = len(self.log)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """An error of writing as an OSError of one line that names the last checkpoint."""
        try:
            yield
        except (OSError, RuntimeError, InputError) as error:  # PyTorch has a RuntimeError for a full disk
            kept = f"; step {self.saved} is in {self.path('state.pt')}, from which --resume goes on"
            reason = str(error) if isinstance(error, InputError) else f"{self.folder}: cannot be written ({error})"
            raise OSError((reason + kept if self.saved > 0 else reason).replace("\n", " ")) from error

    def _load(self, device: torch.device) -> State:
        fields = torch.load(self.path("state.pt"), map_location=device, weights_only=True)
        if not (fields["tokens"].isfinite().all() and 0 <= fields["steps"] <= self.steps):
            raise ValueError("tokens or steps")
        views: list[View] = []
        if self.path("views.pt").is_file():
            none = fields["tokens"][None, :1, :0]  # [1, 1, 0, d]: every step puts the tokens in
            for x0, concat, micro in torch.load(self.path("views.pt"), map_location=device, weights_only=True):
                frames = x0.shape[1]
                concat = concat.expand(-1, frames, -1, -1, -1)  # [1, F, z, h, w]
                spatial, temporal = none.expand(-1, frames, -1, -1), none[:, 0]  # [1, F, 0, d], [1, 0, d]
                views.append((x0, Conditioning(concat, micro, spatial, temporal)))
        self.saved_views = len(views)
        return State(fields["tokens"], fields["optimizer"], fields["steps"], views)


class Previews:
    """An object to be called with each Progress of `learn`; every so many steps it writes a preview.

    preview-00100.mp4 shows the clip, and beside it what the tokens make of the clip's first frame.
    """

    def __init__(self, run: Run, svd: SVD, clip: Clip, every: int, check: Callable[[], None], ranks: Ranks = ALONE):
        self.run, self.svd, self.clip, self.every, self.ranks = run, svd, clip, every, ranks
        self.check = check  # called between two steps of sampling; an exception that it raises ends them
        self.shown = 0  # steps at the last preview, or where the run began or was resumed

    def __call__(self, progress: Progress) -> None:
        """Writes a preview where it is time to."""
        if progress.stage != "learn" or progress.motion is None or not progress.is_settled:
            return
        if progress.loss is None:
            self.shown = progress.step
        elif progress.step // self.every > self.shown // self.every:
            self.shown = progress.step
            motion = replace(progress.motion, tokens=progress.motion.tokens.clone())
            try:
                video = self._animate(motion)
            except (FloatingPointError, torch.OutOfMemoryError) as error:
                if self.ranks.count > 1:  # the others wait for this process
                    raise
                return self._warn(progress.step, error)
            beside = torch.cat([enlarged(part) for part in (to_uint8(self.clip.frames), video)], dim=-1)  # [F, 3, H, W]
            if self.ranks.is_first:
                try:
                    write_clip(self.run.path(f"preview-{progress.step:05}.mp4"), beside, self.clip.fps)
                except InputError as error:
                    self._warn(progress.step, error)

    def _animate(self, motion: Motion) -> Tensor:
        """The clip's first frame in motion. Budget and memory of the training are then as before, also if it fails."""
        before = self.svd.budget
        memory = "low" if before.memory == "low" else "balanced"  # what the step needs stays allocated
        first, check = self.clip.frames[:1], lambda _: self.check()
        try:
            return animate(self.svd, motion, first, seed=motion.seed, memory=memory, progress=check)
        finally:
            self.svd.use(before)
            for network in ("image_encoder", "vae"):
                self.svd.park(network)

    def _warn(self, step: int, error: Exception) -> None:
        """Training goes on."""
        warnings.warn(f"no preview after {step} steps: {str(error).splitlines()[0]}", stacklevel=3)


def folder_of(out: Path) -> Path:
    """The folder of an embedding's run."""
    return out.with_name((out.stem if out.suffix in (".pt", ".safetensors") else out.name) + ".run")


def read_learned(emb: str | Path, motion: Motion, config: SVDConfig, source: str | None = None) -> Clip:
    """The clip that an embedding was learned from, the first of several, at the embedding's size.

    It is read from `source`, else from the frames in the folder of the run, else from the file that the embedding
    names. Files are read as training read them, as far as the embedding says how.

    Raises InputError where there is none of them, where it does not hold such a clip, and, without `source`, where it
    holds another.
    """
    kept, named = str(folder_of(Path(emb)) / "frames"), motion.settings.get("clip", "")
    places = [source] if source else [kept] * os.path.isdir(kept) + [named] * _is_there(named)
    for place in places:
        options = {"stride": 1} if place == kept else motion.reading
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about what is cut off, which training has said
                clip = read_clip(place, config, num_frames=motion.num_frames, size=motion.size, **options)
        except InputError:
            if place == places[-1]:
                raise
            continue
        if source or motion.settings.get("frames") in (None, frames_digest(clip)):
            return clip
    if places:
        raise InputError(f"{emb}: was learned from another clip than {' and '.join(places)}")
    raise InputError(f"{emb}: neither {kept} nor {named or 'its clip'} is there")


def _is_there(source: str) -> bool:
    """Whether a name is that of a file, of a folder of pictures, or a pattern that fits some."""
    try:
        return os.path.isfile(source) or (source != "" and find_pictures(Path(source)) is not None)
    except InputError:
        return False


def frames_digest(clip: Clip) -> str:
    """A name for the frames of a clip, in eight bits as a run keeps them."""
    return _digest([to_uint8(clip.frames)])


def digest(clips: Sequence[Clip]) -> str:
    """A name for the contents of clips in their order."""
    return _digest(clip.frames for clip in clips)


def _digest(tensors: Iterable[Tensor]) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()[:16]


def strip_of(rows: Sequence[Tensor], most: int) -> Tensor:
    """Rows of frames [F, 3, H, W] of one size -> [R, F, 3, h, w] for `write_strip`, with h at most `most`."""
    height, width = rows[0].shape[-2:]
    scale = min(1, most / height)
    return torch.stack([T.resize(row, [round(scale * height), round(scale * width)]) for row in rows])


def draw_losses(path: Path, log: list[dict[str, float]], legs: list[int], title: str) -> None:
    """A PNG of the losses and of the mean of the last SMOOTHED, with a line where steps were added."""
    from matplotlib.figure import Figure

    steps, losses = ([entry[name] for entry in log] for name in ("step", "loss"))
    recent = [losses[max(0, i - SMOOTHED) : i] for i in range(1, len(losses) + 1)]
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, ".", color="0.7", markersize=3, label="of each step, at its own noise level")
    axes.plot(steps, [sum(part) / len(part) for part in recent], color="tab:blue", label=f"mean of the last {SMOOTHED}")
    for end in range(1, len(legs)):
        axes.axvline(sum(legs[:end]), color="0.5", linestyle=":")
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.set_title(printable(title), parse_math=False)  # a name may hold dollars
    axes.legend()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about letters that the font lacks
        figure.savefig(path, format="png", dpi=100)


def _how(setting: str, value: Any) -> str:
    """The option that gives a setting its value: "with --seed 0"."""
    if setting == "clip":
        return "with another clip, or other times or another part of it"
    if setting == "ranks":
        return f"in {value} process{'es' * (value != 1)}"
    if setting == "flip":
        return "without --no-flip" if value else "with --no-flip"
    option = {"optimizer": "recipe", "num_cached_views": "cache"}.get(setting, setting.replace("_", "-"))
    return f"without --{option}" if value is None else f"with --{option} {'paper' if value == 'adam' else value}"


def _free(out: Path) -> tuple[Path, Path]:
    """The first of m-1.pt, m-2.pt, ... that, with its folder, does not exist; and this folder."""
    k = 1
    while (new := out.with_name(f"{out.stem}-{k}{out.suffix}")).exists() or folder_of(new).exists():
        k += 1
    return new, folder_of(new)


def _rename(source: Path, target: Path) -> list[str]:
    """Renames a file or folder where it exists. Returns what to print."""
    if not source.exists():
        return []
    os.rename(source, target)
    return [f"renamed    {source}, which stood there, to {target}"]


def _save(contents: Any, path: Path) -> None:
    buffer = io.BytesIO()  # written by Python, a full disk is an OSError with its reason
    torch.save(contents, buffer)
    with atomic_write(path) as part, open(part, "wb") as file:  # `write_bytes` keeps a view, and Python 3.13 says so
        file.write(buffer.getbuffer())


def _entries(path: Path) -> Iterator[dict[str, float]]:
    """The lines of a log that are whole."""
    if path.is_file():
        for line in path.read_text(errors="replace").splitlines():
            try:
                yield {"step": int((entry := json.loads(line))["step"]), **entry}
            except (ValueError, KeyError, TypeError):
                continue


def _lines(entries: list[dict[str, float]]) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)
