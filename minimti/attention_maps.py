"""Which positions of each frame attend to which token (figure 5): recorded while sampling, and drawn over the video."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from minimti.io.files import atomic_write
from minimti.networks.attention import CrossAttention, TransformerBlock
from minimti.svd import SVD

FRAME_SIDE = 160  # pixels: the longer side of a frame in the picture
SHOWN = 0.65  # share of the colours of the map in the picture; the rest is the frame in grey


class AttentionMaps:
    """Records, between entering and leaving it, how the positions of each frame attend to their tokens (equation 4).

    It looks at the conditional branch of guidance, in the spatial cross-attentions of `finest_blocks`.
    """

    def __init__(self, svd: SVD, num_frames: int):
        self.num_frames = num_frames
        self.layers = [block.attn2 for block in finest_blocks(svd)]
        self.total: Tensor | None = None  # [F, L, N], the sum over layers and sampling steps
        self.count = 0

    def __enter__(self) -> "AttentionMaps":
        self.hooks = [layer.register_forward_hook(self._record) for layer in self.layers]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def mean(self) -> Tensor:
        """Attention weights [F, L, N] on the CPU, a mean over heads, layers and steps; L positions, row by row."""
        if self.total is None:
            raise ValueError("no attention has been recorded")
        return (self.total / self.count).cpu()

    def _record(self, layer: CrossAttention, inputs: tuple[Tensor, Tensor, Tensor], _: Tensor) -> None:
        x, k, _ = (t[-self.num_frames :] for t in inputs)  # the batch of both branches ends with the conditional one
        if k.shape[-2] == 0:  # the other branch, where they are evaluated in turn
            return
        q = layer.split_heads(layer.to_q(x))  # [F, heads, L, head_dim]
        scores = (q @ k.transpose(-2, -1)).float() * layer.head_dim**-0.5  # [F, heads, L, N]
        weights = scores.softmax(dim=-1).mean(1)  # [F, L, N]
        self.total = weights if self.total is None else self.total + weights
        self.count += 1


def finest_blocks(svd: SVD) -> list[TransformerBlock]:
    """The spatial transformer blocks of the finest level that has any, on the way up."""
    *_, finest = (block.attentions for block in svd.unet.up_blocks if len(block.attentions))
    return [transformer.transformer_blocks[0] for transformer in finest]


def heat_maps(weights: Tensor, size: tuple[int, int]) -> Tensor:
    """Attention weights [F, L, N] -> maps [N, F, H, W] of `size` (width, height), in the same units."""
    width, height = size
    cell = math.isqrt(width * height // weights.shape[1])  # pixels along the side of one position
    grid = weights.permute(2, 0, 1).unflatten(-1, (height // cell, width // cell))  # [N, F, rows, columns]
    return F.interpolate(grid, (height, width), mode="bilinear")


def write_attention(path: Path, video: Tensor, weights: Tensor) -> None:
    """A PNG of a video, uint8 [F, 3, H, W], and below it the map of each token over it; time to the right.

    `weights` [F, L, N] are those of AttentionMaps. Colours run from black for 0 to pale yellow for the largest weight
    of all. Raises InputError where the file cannot be written.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # slow to import, and only this picture needs it

    height, width = video.shape[-2:]
    maps = heat_maps(weights.float(), (width, height))  # [N, F, H, W]
    num_tokens, num_frames = maps.shape[:2]
    scale = FRAME_SIDE / max(height, width)
    shape = round(scale * height), round(scale * width)
    frames = F.interpolate(video.float(), shape, mode="bilinear", antialias=True) / 255  # [F, 3, h', w']
    grey = frames.mean(1)[..., None]  # [F, h', w', 1]
    most = maps.max().item()
    maps = F.interpolate(maps, shape, mode="bilinear") / most  # [N, F, h', w']
    colours = torch.from_numpy(colormaps["inferno"](maps.numpy())[..., :3])  # [N, F, h', w', 3]
    rows = [frames.permute(0, 2, 3, 1), *(SHOWN * colour + (1 - SHOWN) * grey for colour in colours)]

    inches = (num_frames * shape[1] / 100 + 1.6, len(rows) * (shape[0] + 6) / 100 + 0.4)
    figure = Figure(figsize=inches, dpi=100)
    left, top = 0.8 / inches[0], 1 - 0.3 / inches[1]
    edges = {"left": left, "right": 1 - left, "top": top, "bottom": 0.05 / inches[1], "wspace": 0.02, "hspace": 0.05}
    grid = figure.subplots(len(rows), num_frames, squeeze=False, gridspec_kw=edges)
    for row, (axes_row, pictures) in enumerate(zip(grid, rows)):
        for frame, (axes, picture) in enumerate(zip(axes_row, pictures)):
            axes.imshow(picture.clamp(0, 1).numpy(), aspect="auto")
            axes.set(xticks=[], yticks=[])
            if row == 0:
                axes.set_title(f"frame {frame}", fontsize=9)
        label = "video" if row == 0 else f"token {row - 1}" if num_tokens > 1 else "the token"
        axes_row[0].set_ylabel(label, fontsize=9)
    bar = figure.add_axes((1 - 0.6 * left, 0.15, 0.15 * left, 0.6))
    bar.imshow(torch.linspace(1, 0, 256)[:, None].numpy(), cmap="inferno", aspect="auto", extent=(0, 1, 0, most))
    bar.set(xticks=[], title="share")
    bar.title.set_fontsize(8)
    bar.tick_params(labelsize=8)
    bar.yaxis.tick_right()
    with atomic_write(path) as part:
        figure.savefig(part, format="png")
