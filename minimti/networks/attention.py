"""Every attention of the UNet, and the spatiotemporal transformer made of it."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimti.config import UNetConfig
from minimti.networks.layers import Blend, TimestepEmbedding, add_owned, sinusoid
from minimti.networks.recompute import SLICE, Checkpointed

FEW_SCORES = 2**21  # of Q K^T; as many stay in the cache of a CPU


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(d_a)) V of [batch, heads, L, d_a], fused but where a CPU is faster without.

    There the scores among few positions cost little, and the fused backward pass much: for 14 frames in bf16 it takes
    20 times as long.
    """
    num_scores = q.numel() // q.shape[-1] * k.shape[-2]
    if q.device.type == "cpu" and num_scores <= FEW_SCORES:
        return ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """The projections of softmax(Q K^T / sqrt(d_a)) V, paper equation 4."""

    def __init__(self, dim: int, context_dim: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))


class SelfAttention(Attention):
    """Among the positions of each frame."""

    def __init__(self, dim: int, head_dim: int):
        super().__init__(dim, dim, head_dim)

    def forward(self, x: Tensor, num_frames: int) -> Tensor:
        """[(B F), L, dim] -> the same shape."""
        projected = (self.to_q(x), self.to_k(x), self.to_v(x))
        heads = [p.unflatten(-1, (-1, self.head_dim)) for p in projected]  # [(B F), L, heads, head_dim]
        return self.to_out(self.attend(*heads, num_frames).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, num_frames: int) -> Tensor:
        return attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


class SelfAttentionOverTime(SelfAttention):
    """The same among the frames of each position. Q, K and V stay where they are: only their strides change."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, num_frames: int) -> Tensor:
        clips = zip(*(t.unflatten(0, (-1, num_frames)).permute(0, 2, 3, 1, 4) for t in (q, k, v)))
        out = [attention(*clip) for clip in clips]  # B times [L, heads, F, head_dim]
        return torch.stack(out).permute(0, 3, 1, 2, 4).flatten(0, 1)


class CrossAttention(Attention):
    """From many positions x to few tokens c.

    With so few tokens the projections of the positions are cheaper applied to the tokens:

        (x W_q) (c W_k)^T = x (c W_k W_q^T)^T  and  softmax(...) (c W_v) W_out = softmax(...) (c W_v W_out)

    The two brackets, here `keys` and `values`, know nothing of x: `absorb` makes them once for constant tokens.
    """

    def absorb(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [sets, N, context_dim] -> keys [sets, dim, heads N], values [sets, heads N, dim].

        A single token gets all the attention whatever the question: then the keys are empty and the values, summed
        over the heads, are the answer [sets, 1, dim].
        """
        v = self.to_v(tokens)
        if tokens.shape[1] == 1:
            return v.new_empty(len(v), v.shape[-1], 0), F.linear(v, self.to_out[0].weight)
        keys = self._through(self.to_k(tokens) * self.head_dim**-0.5, self.to_q.weight)
        values = self._through(v, self.to_out[0].weight.T)
        return keys.permute(1, 3, 0, 2).flatten(2), values.transpose(0, 1).flatten(1, 2)

    def _through(self, projected: Tensor, weight: Tensor) -> Tensor:
        """Projected tokens [sets, N, dim] through a weight [dim, dim], head by head -> [heads, sets, N, dim].

        All sets are rows of one product a head: to broadcast the weight over sets would copy it for each.
        """
        rows = projected.flatten(0, 1).unflatten(-1, (-1, self.head_dim)).transpose(0, 1)
        weight = weight.unflatten(0, (-1, self.head_dim))
        return (rows @ weight).unflatten(1, projected.shape[:2])

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """x [sets, L, dim] -> [sets, L, dim], or [sets, 1, dim] where it is the same for all."""
        if keys.shape[-1] > 0:
            num_tokens = keys.shape[-1] * self.head_dim // keys.shape[-2]
            weights = (x @ keys).unflatten(-1, (-1, num_tokens)).softmax(dim=-1)
            values = weights.flatten(-2) @ values
        return values + self.to_out[0].bias


class GEGLU(nn.Module):
    def __init__(self, dim: int, dim_hidden: int):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * dim_hidden)

    def forward(self, x: Tensor) -> Tensor:
        # Two products, though one would do: its halves would lie interleaved, which costs more than half of the time.
        (w_value, w_gate), (b_value, b_gate) = self.proj.weight.chunk(2), self.proj.bias.chunk(2)
        gate = F.gelu(F.linear(x, w_gate, b_gate))
        return F.linear(x, w_value, b_value) * gate


class FeedForward(Checkpointed):
    """Its hidden layer, eight times as wide as x, is the largest tensor of the network."""

    def __init__(self, dim: int):
        super().__init__()
        # The identity stands where training had dropout, so that the last layer is `net.2` as in the files.
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        return self.in_slices(self.net, rows, num_slices=-(-8 * rows.nbytes // SLICE)).view(x.shape)


class Context(NamedTuple):
    """What one transformer takes from the tokens: keys and values of its two cross-attentions."""

    spatial_keys: Tensor  # [(T F), C, heads N]: the tokens of each frame
    spatial_values: Tensor  # [(T F), heads N, C]
    temporal_keys: Tensor  # [T, C, heads N]: those of the clip
    temporal_values: Tensor  # [T, heads N, C]


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward."""

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
        """Fresh x [(B F), L, C] -> the same shape; keys and values of `attn2` are those of the last items of the batch.

        A query of cross-attention knows nothing of its neighbours: over time, all positions of a clip ask the same
        tokens and form one long sequence.
        """
        x = add_owned(x, self.attn1(self.norm1(x), num_frames))
        sequences = x.unflatten(0, (-1, num_frames)).flatten(1, 2) if self.over_time else x
        x = self._ask(sequences, keys, values).view(x.shape)
        return add_owned(x, self.ff(self.norm3(x)))

    def _ask(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """x + attn2(norm2(x)). Items without keys attend to zeroed tokens: what they get is 0, projected the bias."""
        silent, asking = x.split([len(x) - len(keys), len(keys)])
        asking = add_owned(asking, self.attn2(self.norm2(asking), keys, values))
        if not len(silent):
            return asking
        silent = add_owned(silent, self.attn2.to_out[0].bias)
        return torch.cat([silent, asking]) if torch.is_grad_enabled() else x


class TemporalBlock(TransformerBlock):
    """The same over time, behind one more feed-forward."""

    over_time = True

    def __init__(self, dim: int, context_dim: int, head_dim: int):
        super().__init__(dim, context_dim, head_dim)
        self.norm_in = nn.LayerNorm(dim)
        self.ff_in = FeedForward(dim)

    def forward(self, x: Tensor, num_frames: int, keys: Tensor, values: Tensor) -> Tensor:
        return super().forward(add_owned(x, self.ff_in(self.norm_in(x))), num_frames, keys, values)


class SpatioTemporalTransformer(nn.Module):
    """A spatial block, then a temporal one on its output, blended (sgm's SpatialVideoTransformer)."""

    def __init__(self, channels: int, config: UNetConfig):
        super().__init__()
        sizes = channels, config.context_dim, config.num_head_channels
        self.norm = nn.GroupNorm(config.norm_groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(*sizes)])
        self.temporal_transformer_blocks = nn.ModuleList([TemporalBlock(*sizes)])
        self.time_pos_embed = TimestepEmbedding(channels, 4 * channels, channels)
        self.time_mixer = Blend(weighs_temporal=False)
        self.proj_out = nn.Linear(channels, channels)

    def absorb(self, spatial_tokens: Tensor, temporal_tokens: Tensor) -> Context:
        """Spatial tokens [T, F, N, d] and temporal tokens [T, N, d] of T clips."""
        spatial = self.transformer_blocks[0].attn2.absorb(spatial_tokens.flatten(0, 1))
        return Context(*spatial, *self.temporal_transformer_blocks[0].attn2.absorb(temporal_tokens))

    def forward(self, x: Tensor, num_frames: int, context: Context) -> Tensor:
        """[(B F), C, H, W] -> the same shape; the context is that of the last T of B clips."""
        residual = x
        x = self.norm(x).flatten(2).transpose(1, 2)  # [(B F), (H W), C]
        x = self.proj_in(x)
        frame_index = torch.arange(num_frames, device=x.device)
        frame_embedding = self.time_pos_embed(sinusoid(frame_index, x.shape[-1]).to(x.dtype))  # [F, C]
        x = self.transformer_blocks[0](x, num_frames, *context[:2])
        clip = x.unflatten(0, (-1, num_frames)) + frame_embedding[:, None]  # [B, F, (H W), C]
        over_time = self.temporal_transformer_blocks[0](clip.flatten(0, 1), num_frames, *context[2:])
        x = self.proj_out(self.time_mixer(x, over_time))
        return add_owned(x.transpose(1, 2).unflatten(2, residual.shape[-2:]), residual)
