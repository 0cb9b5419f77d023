"""What was measured: collected over seeds, kept in a JSON file, shown as a table."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from minimti.checkpoint.fingerprint import differs
from minimti.io.files import InputError, atomic_write

Values = dict[str, list]  # by motion: a number for each target, or an answer (True, False, None where there is none)
Result = dict[str, dict[str, Values]]  # by label of a table row, by quantity

HEADER = (
    "| experiment | quantity | mean | 95 % interval | deviation over motions | over seeds | clips |\n"
    "|---|---|---|---|---|---|---|"
)
RESAMPLES = 10_000  # samples of the bootstrap


class Results:
    """The results of experiments, by seed; with a path also in that file, which every `add` writes.

    An existing file with the same settings is continued. Raises InputError where it holds results of other settings,
    of other weights, or something else.
    """

    def __init__(self, path: Path | None, settings: dict, fingerprint: dict[str, list[float]]):
        """settings: numbers and strings that results depend on. fingerprint: of the model's weights."""
        self.path = path
        self.content: dict = {"settings": settings, "fingerprint": fingerprint, "seeds": {}}
        if self.path and self.path.exists():
            self.content["seeds"] = self._existing(self.path)

    def _existing(self, path: Path) -> dict:
        """The part "seeds" of a file, after the checks."""
        try:
            found = json.loads(path.read_text())
            settings, fingerprint, seeds = found["settings"], found["fingerprint"], found["seeds"]
            if not all(isinstance(part, dict) for part in (settings, fingerprint, seeds)):
                raise TypeError("not dictionaries")
            for found in (found for experiments in seeds.values() for found in experiments.values()):
                for values in (part["values"] for row in found["rows"].values() for part in row.values()):
                    [float(value) for clips in values.values() for value in clips if value is not None]
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            raise InputError(f"{path}: was not written by minimti.evaluate; name another file") from error
        mine = self.content["settings"]
        other = [f"{key} {settings.get(key)}, not {value}" for key, value in mine.items() if settings.get(key) != value]
        if other:
            raise InputError(f"{path}: holds results of other settings ({'; '.join(other)}); name another file")
        if differs(fingerprint, self.content["fingerprint"]):
            raise InputError(f"{path}: holds results of other weights; name another file")
        return seeds

    def has(self, seed: int, experiment: str) -> bool:
        """Whether an experiment is done for a seed."""
        return experiment in self.content["seeds"].get(str(seed), {})

    def add(self, seed: int, experiment: str, result: Result, seconds: float) -> None:
        """Takes the result of an experiment for a seed, and writes the file."""
        rows = {
            label: {quantity: summary([values]) | {"values": values} for quantity, values in quantities.items()}
            for label, quantities in result.items()
        }
        self.content["seeds"].setdefault(str(seed), {})[experiment] = {"seconds": seconds, "rows": rows}
        if self.path:
            with atomic_write(self.path) as part:
                part.write_text(json.dumps(self.content, indent=1) + "\n")

    def table(self, experiment: str, seeds: Sequence[int]) -> list[str]:
        """The rows of an experiment, below HEADER: for every quantity its mean over all seeds, and its spread."""
        by_seed = [self.content["seeds"][str(seed)][experiment]["rows"] for seed in seeds]
        lines = []
        for label, quantities in by_seed[0].items():
            for quantity in quantities:
                found = summary([rows[label][quantity]["values"] for rows in by_seed])
                mean, *deviations = (shown(found[key]) for key in ("mean", "over_motions", "over_seeds"))
                interval = " to ".join(map(shown, found["interval"])) if found["interval"] else "-"
                cells = " | ".join([quantity, mean, interval, *deviations, str(found["clips"])])
                lines.append(f"| {experiment}: {label} | {cells} |")
        return lines


def summary(by_seed: Sequence[Values]) -> dict:
    """The statistics of a quantity, given for one or more seeds.

    mean          over all clips that have a value
    interval      of the mean, with 95 % confidence: the bootstrap over motions, each with all its clips
    over_motions  standard deviation of the motions' means; motions of one name in several seeds count as one
    over_seeds    standard deviation of the seeds' means
    clips         the number of clips that have a value
    motions       the mean of each motion

    Deviations are those of the population. A statistic is None where there are no values, over_seeds also where there
    is a single seed, the interval where there is a single motion.
    """
    motions: Values = {}
    seeds: list[list[float]] = []
    drawn: list[list[float]] = []  # a list for each motion of each seed
    for values in by_seed:
        valid = {name: [value for value in clips if value is not None] for name, clips in values.items()}
        seeds.append([value for clips in valid.values() for value in clips])
        drawn += valid.values()
        for name, clips in valid.items():
            motions.setdefault(name, []).extend(clips)
    everything = [value for clips in seeds for value in clips]
    motion_means = {name: float(np.mean(clips)) for name, clips in motions.items() if clips}
    seed_means = [float(np.mean(clips)) for clips in seeds if clips]
    return {
        "mean": float(np.mean(everything)) if everything else None,
        "interval": bootstrap([clips for clips in drawn if clips]),
        "over_motions": float(np.std([*motion_means.values()])) if everything else None,
        "over_seeds": float(np.std(seed_means)) if len(seed_means) > 1 else None,
        "clips": len(everything),
        "motions": motion_means,
    }


def bootstrap(groups: Sequence[Sequence[float]]) -> list[float] | None:
    """The 2.5th and 97.5th percentile of the mean of all values, where groups are drawn with replacement.

    None where there are fewer than two groups.
    """
    if len(groups) < 2:
        return None
    sums, counts = np.array([sum(group) for group in groups], float), np.array([len(group) for group in groups])
    chosen = np.random.default_rng(0).integers(len(groups), size=(RESAMPLES, len(groups)))
    return np.percentile(sums[chosen].sum(1) / counts[chosen].sum(1), [2.5, 97.5]).tolist()


def shown(number: float | None) -> str:
    """A number with three significant digits, in a table's cell."""
    return "-" if number is None else f"{number:.3g}"
