"""Every attention of the UNet, and the spatiotemporal transformer made of it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimti.layers import NORM_GROUPS, Blend, TimestepEmbedding, sinusoid
from minimti.memory import SLICE, Frugal


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(d_a)) V, paper equation 4. Self-attention where no context is given."""

    def __init__(self, dim: int, context_dim: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x [batch, L, dim], context [batch, N, context_dim] -> [batch, L, dim]."""
        context = x if context is None else context
        q, k, v = (
            projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [batch, heads, L or N, head_dim]
            for projected in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    def __init__(self, dim: int, dim_hidden: int):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * dim_hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(Frugal):
    """Its hidden layer, eight times as wide as x, is the largest tensor of the network."""

    def __init__(self, dim: int):
        super().__init__()
        # The identity stands where training had dropout, so that the last layer is `net.2` as in the files.
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        return self.in_slices(self.net, rows, num_slices=-(-8 * rows.nbytes // SLICE)).view(x.shape)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward."""

    def __init__(self, dim: int, context_dim: int, head_dim: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, dim, head_dim)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, context_dim, head_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x [batch, L, C] attends to itself along L, then to context [contexts, N, d]; returns [batch, L, C].

        Consecutive items of the batch share a context. Over space each frame has its own: batch = contexts = (B F).
        Over time all positions of a clip ask the same tokens: batch = (B H W), contexts = B. A query of
        cross-attention knows nothing of its neighbours, so they form one long sequence and no token is copied.
        """
        shape = x.shape
        x = x + self.attn1(self.norm1(x))
        x = x.reshape(context.shape[0], -1, shape[-1])  # over time [B, (H W F), C]
        x = x + self.attn2(self.norm2(x), context)
        x = x + self.ff(self.norm3(x))
        return x.view(shape)


class TemporalBlock(TransformerBlock):
    """The same behind one more feed-forward."""

    def __init__(self, dim: int, context_dim: int, head_dim: int):
        super().__init__(dim, context_dim, head_dim)
        self.norm_in = nn.LayerNorm(dim)
        self.ff_in = FeedForward(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return super().forward(x + self.ff_in(self.norm_in(x)), context)


class SpatioTemporalTransformer(nn.Module):
    """A spatial block, then a temporal one on its output, blended (sgm's SpatialVideoTransformer)."""

    def __init__(self, channels: int, context_dim: int, head_dim: int):
        super().__init__()
        self.norm = nn.GroupNorm(NORM_GROUPS, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, context_dim, head_dim)])
        self.temporal_transformer_blocks = nn.ModuleList([TemporalBlock(channels, context_dim, head_dim)])
        self.time_pos_embed = TimestepEmbedding(channels, 4 * channels, channels)
        self.time_mixer = Blend(weighs_temporal=False)
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, spatial_tokens: Tensor, temporal_tokens: Tensor) -> Tensor:
        """x [(B F), C, H, W], spatial tokens [B, F, N, d], temporal tokens [B, N, d] -> [(B F), C, H, W]."""
        residual = x
        num_frames, (height, width) = spatial_tokens.shape[1], x.shape[-2:]
        x = self.norm(x).flatten(2).transpose(1, 2)  # [(B F), (H W), C]
        x = self.proj_in(x)
        frame_index = torch.arange(num_frames, device=x.device)
        frame_embedding = self.time_pos_embed(sinusoid(frame_index, x.shape[-1]).to(x.dtype))  # [F, C]
        for spatial, temporal in zip(self.transformer_blocks, self.temporal_transformer_blocks):
            x = spatial(x, spatial_tokens.flatten(0, 1))
            clip = x.unflatten(0, (-1, num_frames)).transpose(1, 2)  # [B, (H W), F, C]
            over_time = temporal((clip + frame_embedding).flatten(0, 1), temporal_tokens)  # [(B H W), F, C]
            over_time = over_time.unflatten(0, (-1, height * width)).transpose(1, 2).flatten(0, 1)  # [(B F), (H W), C]
            x = self.time_mixer(x, over_time)
        x = self.proj_out(x)
        return residual + x.transpose(1, 2).unflatten(2, (height, width))
