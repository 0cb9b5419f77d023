"""Attention of the UNet: among positions, among frames, from positions to tokens; and the transformer built of them.

In shapes, B is the number of clips, F the frames of each, L = H W the positions of a frame, N the tokens of a set.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimti.config import UNetConfig
from minimti.networks import fused
from minimti.networks.layers import Blend, GroupNorm, TimestepEmbedding, add_owned, module_list, repeated, sinusoid
from minimti.networks.recompute import Checkpointed

FEW_SCORES = 2**21  # entries of Q K^T that fit in the cache of a CPU
FEW_FRAMES = 32  # a GPU's fused attention works in blocks of 64 and more; among fewer it is slower than the equation
PART_POSITIONS = 1024  # that attend to the tokens of a set at once, at least


def attention(q: Tensor, k: Tensor, v: Tensor, few_scores: int = FEW_SCORES) -> Tensor:
    """softmax(Q K^T / sqrt(d_a)) V, the paper's equation 4, for all heads at once.

    q [batch, heads, L, d_a], k and v [batch, heads, N, d_a] -> [batch, heads, L, d_a].

    On a CPU, up to `few_scores` scores are computed as the equation is written: the backward pass of PyTorch's fused
    attention takes up to 20 times as long there (14 frames in bf16). So is attention among few frames on a GPU, in half
    the time (14 frames on an H100). Everything else is fused, without a matrix of scores in memory.
    """
    num_scores = q.numel() // q.shape[-1] * k.shape[-2]
    if num_scores <= few_scores if fused.on_cpu(q) else max(q.shape[-2], k.shape[-2]) <= FEW_FRAMES:
        return ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """The projections of multi-head attention. `dim` features are split into heads of `head_dim` (d_a) each."""

    few_scores = FEW_SCORES

    def __init__(self, dim: int, context_dim: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))  # a sequence of one, for the key `to_out.0` of the files

    def split_heads(self, projected: Tensor) -> Tensor:
        """[batch, L, dim] -> [batch, heads, L, head_dim], a view."""
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def project_out(self, attended: Tensor) -> Tensor:
        """[batch, heads, L, head_dim] -> [batch, L, dim]."""
        return self.to_out(attended.transpose(1, 2).flatten(2))


class SelfAttention(Attention):
    """Self-attention among the positions of each frame."""

    def __init__(self, dim: int, head_dim: int):
        super().__init__(dim, dim, head_dim)

    def forward(self, x: Tensor, num_frames: int) -> Tensor:
        """[(B F), L, dim] -> the same shape."""
        q, k, v = (self.split_heads(project(x)) for project in (self.to_q, self.to_k, self.to_v))
        return self.project_out(self.attend(q, k, v, num_frames))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, num_frames: int) -> Tensor:
        """Three times [(B F), heads, L, head_dim] -> the same shape."""
        return attention(q, k, v, self.few_scores)


class SelfAttentionOverTime(SelfAttention):
    """Self-attention among the frames of each position."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, num_frames: int) -> Tensor:
        """Three times [(B F), heads, L, head_dim] -> the same shape.

        Each clip goes separately. The positions of one clip become its batch dimension by a change of strides; with
        several clips, clips and positions together form no dimension of equal strides, and Q, K, V would be copied.
        """
        q, k, v = (t.unflatten(0, (-1, num_frames)).permute(0, 3, 2, 1, 4) for t in (q, k, v))  # [B, L, heads, F, d_a]
        if len(q) == 1:
            clips = attention(q.squeeze(0), k.squeeze(0), v.squeeze(0), self.few_scores).unsqueeze(0)
        else:
            clips = torch.stack([attention(*clip, self.few_scores) for clip in zip(q, k, v)])
        rows = clips.permute(0, 3, 1, 2, 4).flatten(0, 1)  # [(B F), L, heads, head_dim], as `project_out` needs it
        return rows.transpose(1, 2)  # [(B F), heads, L, head_dim]


class CrossAttention(Attention):
    """Cross-attention from positions to tokens: to_out(softmax(Q K^T / sqrt(d_a)) V), the paper's equation 4.

    Q comes from the positions, K and V from the tokens. Tokens that stay the same over many evaluations, as in
    sampling, need their K and V only once; hence `keys_values` is apart from `forward`.
    """

    def keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [sets, N, context_dim] -> K and V, [sets, heads, N, head_dim] each."""
        return self.split_heads(self.to_k(tokens)), self.split_heads(self.to_v(tokens))

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The positions of each sequence attend to the tokens of its set.

        x        [sets, L, dim]
        k, v     [sets, heads, N, head_dim]: what `keys_values` returns
        returns  [sets, L, dim], or [sets, 1, dim] where the result is the same for all positions

        It is the same for all positions if N < 2, and then takes no Q. The softmax over a single score is 1, so one
        token gives its V. No token gives 0, as do the zeroed tokens of the official guidance: without a bias in the
        projections, their V is 0. Either way the result is the sum of V over the tokens.
        """
        num_tokens = v.shape[2]
        if num_tokens < 2:
            return self.project_out(v.sum(dim=2, keepdim=True))
        # The positions of a set go in parts, each with a copy of K and V. The backward pass of fused attention goes
        # through the queries of a set one after the other, so that few sets would occupy few multiprocessors of a GPU.
        parts = num_parts(x.shape[1])
        q = self.to_q(x).unflatten(1, (parts, -1)).flatten(0, 1)  # [(sets parts), L / parts, dim]
        k, v = repeated(k, parts), repeated(v, parts)  # [(sets parts), heads, N, head_dim]
        return self.project_out(attention(self.split_heads(q), k, v, self.few_scores)).view(x.shape)


def num_parts(positions: int) -> int:
    """A power of two that divides the number of positions and leaves about PART_POSITIONS or more in each part."""
    return math.gcd(positions, 2 ** max(0, (positions // PART_POSITIONS).bit_length() - 1))


class GEGLU(nn.Module):
    """A linear layer gated by the GELU of another one, [..., dim] -> [..., dim_hidden] (Shazeer 2020)."""

    def __init__(self, dim: int, dim_hidden: int):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * dim_hidden)  # first the value, then the gate

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim_hidden]."""
        if fused.applies(x, self.proj.weight):
            return fused.geglu(self.proj(x))
        # Two products instead of one that is split: the halves of its rows are not contiguous, and the backward pass
        # would spend more than half of the layer's time on copying them.
        (w_value, w_gate), (b_value, b_gate) = self.proj.weight.chunk(2), self.proj.bias.chunk(2)
        gate = F.gelu(F.linear(x, w_gate, b_gate))
        return F.linear(x, w_value, b_value) * gate


class FeedForward(Checkpointed):
    """The feed-forward of a transformer. Its hidden layer, 8 dim wide, is the largest tensor of the network."""

    def __init__(self, dim: int):
        super().__init__()
        # The identity is in the place of the dropout of training, so that the last layer is `net.2` as in the files.
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """net(norm(x)), [..., dim] -> the same shape. The norm is computed slice by slice too."""
        rows = x.flatten(0, -2)  # [positions, dim]
        num_slices = -(-8 * rows.nbytes // self.slice_bytes)
        return self.in_slices(lambda positions: self.net(norm(positions)), rows, num_slices).view(x.shape)


class Context(NamedTuple):
    """What one transformer takes besides its input: K and V of its two cross-attentions, from the tokens of B clips."""

    spatial_keys: Tensor  # [(B F), heads, N, head_dim], from the tokens of each frame
    spatial_values: Tensor  # the same shape
    temporal_keys: Tensor  # [B, heads, N, head_dim], from the temporal tokens of each clip
    temporal_values: Tensor  # the same shape
    frame_embedding: Tensor  # [F, C], of the positions of frames; it depends on F alone


class TransformerBlock(Checkpointed):
    """Self-attention among the positions of a frame, cross-attention to its tokens, feed-forward; each is residual."""

    over_time = False

    def __init__(self, dim: int, context_dim: int, head_dim: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = (SelfAttentionOverTime if self.over_time else SelfAttention)(dim, head_dim)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = CrossAttention(dim, context_dim, head_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, num_frames: int, keys: Tensor, values: Tensor) -> Tensor:
        """[(B F), L, dim] -> the same shape, possibly in the memory of x: the caller must not use x afterwards.

        keys, values  [sets, heads, N, head_dim], of `attn2`. Over space there is a set for each frame, sets = B F.
                      Over time all positions of all frames of a clip attend to the same tokens, so that a clip is one
                      long sequence: sets = B.
        """
        x = add_owned(x, self.checkpointed_inside(self._attend_to_itself, x, num_frames))
        sequences = x.unflatten(0, (-1, num_frames)).flatten(1, 2) if self.over_time else x  # [B, (F L), dim]
        sequences = add_owned(sequences, self.checkpointed_inside(self._attend_to_tokens, sequences, keys, values))
        x = sequences.view(x.shape)  # [(B F), L, dim]
        return add_owned(x, self.ff(x, self.norm3))

    def _attend_to_itself(self, x: Tensor, num_frames: int) -> Tensor:
        return self.attn1(self.norm1(x), num_frames)

    def _attend_to_tokens(self, sequences: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return self.attn2(self.norm2(sequences), keys, values)


class TemporalBlock(TransformerBlock):
    """The same with self-attention among the frames of a position and temporal tokens, behind one more feed-forward."""

    over_time = True

    def __init__(self, dim: int, context_dim: int, head_dim: int):
        super().__init__(dim, context_dim, head_dim)
        self.norm_in = nn.LayerNorm(dim)
        self.ff_in = FeedForward(dim)

    def forward(self, x: Tensor, num_frames: int, keys: Tensor, values: Tensor) -> Tensor:
        """Shapes and ownership of x as in TransformerBlock."""
        return super().forward(add_owned(x, self.ff_in(x, self.norm_in)), num_frames, keys, values)


class SpatioTemporalTransformer(nn.Module):
    """A spatial block, then a temporal block on its output, blended; the whole is residual.

    Source: SpatialVideoTransformer in sgm/modules/video_attention.py of Stability's generative-models.
    """

    def __init__(self, channels: int, config: UNetConfig):
        super().__init__()
        sizes = channels, config.context_dim, config.num_head_channels
        self.norm = GroupNorm(config.norm_groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = module_list([TransformerBlock(*sizes)])
        self.temporal_transformer_blocks = module_list([TemporalBlock(*sizes)])
        self.time_pos_embed = TimestepEmbedding(channels, 4 * channels, channels)
        self.time_mixer = Blend(weighs_temporal=False)
        self.proj_out = nn.Linear(channels, channels)

    def project_tokens(self, spatial: Tensor, temporal: Tensor) -> Context:
        """Spatial tokens [B, F, N, context_dim] and temporal tokens [B, N, context_dim] -> K and V for `forward`."""
        sets = spatial.flatten(0, 1)  # [(B F), N, context_dim]
        frame_index = torch.arange(spatial.shape[1], device=spatial.device)
        return Context(
            *self.transformer_blocks[0].attn2.keys_values(sets),
            *self.temporal_transformer_blocks[0].attn2.keys_values(temporal),
            self.time_pos_embed(sinusoid(frame_index, self.proj_in.out_features).to(spatial.dtype)),
        )

    def forward(self, x: Tensor, num_frames: int, context: Context) -> Tensor:
        """[(B F), C, H, W] and the context of the same B clips -> the same shape."""
        residual = x
        x = self.norm(x).flatten(2).transpose(1, 2)  # [(B F), (H W), C]
        x = self.proj_in(x)
        x = self.transformer_blocks[0](x, num_frames, context.spatial_keys, context.spatial_values)
        clips = x.unflatten(0, (-1, num_frames)) + context.frame_embedding[:, None]  # [B, F, (H W), C]
        over_time = self.temporal_transformer_blocks[0](
            clips.flatten(0, 1),  # [(B F), (H W), C]
            num_frames,
            context.temporal_keys,
            context.temporal_values,
        )
        x = self.proj_out(self.time_mixer(x, over_time))
        return add_owned(x.transpose(1, 2).unflatten(2, residual.shape[-2:]), residual)  # [(B F), C, H, W]
