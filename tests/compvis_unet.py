"""The U-Net of latent diffusion and of guided-diffusion as they publish it, written again for tests.

Module names, the order of queries, keys and values, and the formulas follow ``openaimodel.py`` and ``attention.py`` of
CompVis/latent-diffusion; no code of `meme` is used.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def norm(channels, groups, eps=1e-5):
    return nn.GroupNorm(groups, channels, eps=eps)


class ResBlock(nn.Module):
    def __init__(self, channels, emb, out, groups, scale_shift=False, up=False, down=False):
        super().__init__()
        self.in_layers = nn.Sequential(norm(channels, groups), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, 2 * out if scale_shift else out))
        self.out_layers = nn.Sequential(norm(out, groups), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(out, out, 3, padding=1))
        self.skip_connection = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)
        self.scale_shift, self.up, self.down = scale_shift, up, down

    def resized(self, x):
        if self.up:
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return F.avg_pool2d(x, 2) if self.down else x

    def forward(self, x, emb, context):
        h = self.in_layers[2](self.resized(self.in_layers[1](self.in_layers[0](x))))
        emb = self.emb_layers(emb)[..., None, None]
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + emb)
        return self.skip_connection(self.resized(x)) + h


class AttentionBlock(nn.Module):
    """With ``QKVAttentionLegacy``: heads are split before queries, keys and values are."""

    def __init__(self, channels, head_channels, groups):
        super().__init__()
        self.heads = channels // head_channels
        self.norm = norm(channels, groups)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x, emb, context):
        b, c, *spatial = x.shape
        flat = x.reshape(b, c, -1)
        qkv = self.qkv(self.norm(flat))
        width = qkv.shape[1] // (3 * self.heads)
        q, k, v = qkv.reshape(b * self.heads, 3 * width, -1).split(width, dim=1)
        scale = 1 / math.sqrt(math.sqrt(width))
        weight = torch.einsum("bct,bcs->bts", q * scale, k * scale).softmax(dim=-1)
        h = torch.einsum("bts,bcs->bct", weight, v).reshape(b, -1, flat.shape[-1])
        return (flat + self.proj_out(h)).reshape(b, c, *spatial)


class CrossAttention(nn.Module):
    def __init__(self, query, context, heads):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(query, query, bias=False)
        self.to_k = nn.Linear(context, query, bias=False)
        self.to_v = nn.Linear(context, query, bias=False)
        self.to_out = nn.Sequential(nn.Linear(query, query), nn.Dropout(0.0))

    def forward(self, x, context):
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        weight = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(dim=-1)
        return self.to_out((weight @ v).transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    def __init__(self, channels, inner):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * inner)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Dropout(0.0), nn.Linear(4 * channels, channels))

    def forward(self, x):
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    def __init__(self, channels, heads, context):
        super().__init__()
        self.attn1, self.attn2 = CrossAttention(channels, channels, heads), CrossAttention(channels, context, heads)
        self.ff = FeedForward(channels)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(channels), nn.LayerNorm(channels), nn.LayerNorm(channels)

    def forward(self, x, context):
        normed = self.norm1(x)
        x = self.attn1(normed, normed) + x
        x = self.attn2(self.norm2(x), context) + x
        return self.ff(self.norm3(x)) + x


class SpatialTransformer(nn.Module):
    def __init__(self, channels, heads, context, groups):
        super().__init__()
        self.norm = norm(channels, groups, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([BasicTransformerBlock(channels, heads, context)])
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x, emb, context):
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        h = self.transformer_blocks[0](h, context).transpose(1, 2).reshape(x.shape)
        return self.proj_out(h) + x


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x, emb, context):
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, emb, context):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Embed(nn.ModuleList):
    """``TimestepEmbedSequential``."""

    def forward(self, x, emb, context):
        for layer in self:
            x = layer(x, emb, context)
        return x


class FirstConv(nn.Conv2d):
    def forward(self, x, emb, context):
        return super().forward(x)


class UNetModel(nn.Module):
    """``resblock_updown`` and ``scale_shift`` are ADM's; ``context`` is the width of a class's embedding, None: no classes."""

    def __init__(self, channels, out, width, mults, depth, attention, head_channels, groups, adm=False, context=None):
        super().__init__()
        self.width, emb = width, 4 * width
        self.time_embed = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb))

        def res(channels, out, **resize):
            return ResBlock(channels, emb, out, groups, scale_shift=adm, **resize)

        def attend(channels):
            if context is None:
                return AttentionBlock(channels, head_channels, groups)
            return SpatialTransformer(channels, channels // head_channels, context, groups)

        self.input_blocks = nn.ModuleList([Embed([FirstConv(channels, width, 3, padding=1)])])
        ch, skips, ds = width, [width], 1
        for level, mult in enumerate(mults):
            for _ in range(depth):
                layers = [res(ch, mult * width)]
                ch = mult * width
                if ds in attention:
                    layers.append(attend(ch))
                self.input_blocks.append(Embed(layers))
                skips.append(ch)
            if level != len(mults) - 1:
                self.input_blocks.append(Embed([res(ch, ch, down=True) if adm else Downsample(ch)]))
                skips.append(ch)
                ds *= 2
        self.middle_block = Embed([res(ch, ch), attend(ch), res(ch, ch)])
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(mults))):
            for position in range(depth + 1):
                layers = [res(ch + skips.pop(), width * mult)]
                ch = width * mult
                if ds in attention:
                    layers.append(attend(ch))
                if level and position == depth:
                    layers.append(res(ch, ch, up=True) if adm else Upsample(ch))
                    ds //= 2
                self.output_blocks.append(Embed(layers))
        self.out = nn.Sequential(norm(ch, groups), nn.SiLU(), nn.Conv2d(width, out, 3, padding=1))

    def forward(self, x, t, context=None):
        half = self.width // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half) / half)
        angles = t[:, None].float() * frequencies
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=-1))
        hidden = []
        for block in self.input_blocks:
            x = block(x, emb, context)
            hidden.append(x)
        x = self.middle_block(x, emb, context)
        for block in self.output_blocks:
            x = block(torch.cat([x, hidden.pop()], dim=1), emb, context)
        return self.out(x)
