"""The card of a pre-trained model: a short description, and a table of the stages that made it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from minimti import __version__
from minimti.pretrain.stages import Stage
from minimti.svd import SVD

Row = dict[str, str | int | float]  # column -> value; kept as JSON in the metadata of the model's file


@dataclass
class Record:
    """What is measured of a stage while it runs."""

    losses: list[float] = field(default_factory=list)  # one per step
    seconds: float = 0.0
    hardware: list[str] = field(default_factory=list)
    psnr: float | None = None  # dB, of held-out frames


def rows(
    command: str, stages: Sequence[Stage], records: Sequence[Record], encoding_seconds: Mapping[str, float]
) -> list[Row]:
    """The table's rows for the stages that have a record.

    encoding_seconds (by kind of clips) count towards the first stage that needed the clips.
    """
    done: list[Row] = []
    remaining = dict(encoding_seconds)
    for stage, record in zip(stages, records):
        share = max(1, len(record.losses) // 20)
        seconds = record.seconds + sum(remaining.pop(kind, 0.0) for kind in stage.clips)
        first, last = np.mean(record.losses[:share]), np.mean(record.losses[-share:])
        done.append(
            {
                "command": command,
                "stage": f"{stage.name}: {stage.title}",
                "steps": len(record.losses),
                "batch": stage.batch,
                "minutes": round(seconds / 60, 1),
                "loss": f"{first:.4f} to {last:.4f}",
                "held-out PSNR": "" if record.psnr is None else f"{record.psnr:.1f} dB",
                "on": "; ".join(record.hardware),
            }
        )
    return done


def card(svd: SVD, table: Sequence[Row]) -> str:
    """The card in Markdown. `table` holds the rows of all runs that made the model, in their order; at least one."""
    commands = dict.fromkeys(f"`{row['command']}`" for row in table)
    networks = (svd.unet, svd.vae, svd.image_encoder)
    unet, vae, tower = (sum(p.numel() for p in network.parameters()) / 1e6 for network in networks)
    columns = [key for key in table[0] if key != "command"]
    (width, height), sizes = svd.config.size, svd.config.vae
    cell = sizes.cell
    return "\n".join(
        [
            f"# The training of `{svd.config.name}`",
            "",
            "The networks of Stable Video Diffusion at small sizes, trained from scratch on the procedural world"
            " (`minimti/world`), which has ten sprites and twelve words. The model has seen no photograph.",
            "",
            f"- made with: {', then '.join(commands)} (minimti {__version__}, PyTorch {torch.__version__})",
            f"- time: {sum(float(row['minutes']) for row in table) / 60:.2f} hours, including the encoding of clips",
            f"- clips: {svd.config.num_frames} frames of {width}x{height}; latents of {sizes.z_channels} channels in"
            f" cells of {cell}x{cell} pixels (SVD's: 4 in cells of 8x8)",
            f"- parameters: UNet {unet:.2f} M, autoencoder {vae:.2f} M, image encoder {tower:.2f} M; averaged over"
            " training, stored in fp16",
            "- files: the model in the layout of Stability's `svd.safetensors`, and `words.safetensors`, the embedding"
            " of captions",
            "",
            "Losses are means over the first and the last twentieth of the steps.",
            "",
            f"| {' | '.join(columns)} |",
            f"|{'---|' * len(columns)}",
            *(f"| {' | '.join(str(row[key]) for key in columns)} |" for row in table),
            "",
        ]
    )
