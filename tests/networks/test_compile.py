"""torch.compile on the CPU: one graph, the same numbers, nothing compiled again. Minutes of g++, hence marked full."""

from dataclasses import replace

import pytest
import torch
from official import SMALL, fill_by_name

from minimti.networks.recompute import set_mode
from minimti.networks.unet import UNet
from minimti.pipeline import compile_unet

CONFIG = replace(SMALL.unet, channel_mult=(1, 1), num_res_blocks=1, attention_resolutions=(2,))


def step(unet: UNet, draw: int, learns: bool) -> list[torch.Tensor]:
    """In training the output and the gradients of both token sets; in sampling the output for a batch of guidance."""
    generator = torch.Generator().manual_seed(draw)
    batch = 1 if learns else 2
    shapes = ((batch, 3, 8, 8, 8), (batch,), (batch, 3, 5, 48), (batch, 5, 48))
    with torch.inference_mode(not learns):
        x, c_noise, *sets = (torch.randn(shape, generator=generator) for shape in shapes)
        sets = [tokens.requires_grad_(learns) for tokens in sets]
        out = unet(x, c_noise, torch.tensor([[6, 127, 0.02]]).expand(batch, -1), unet.project_tokens(*sets))
        return [out, *(torch.autograd.grad(out.square().sum(), sets) if learns else ())]


@pytest.mark.full
@pytest.mark.parametrize("learns, mode", [(True, "balanced"), (True, "low"), (True, None), (False, None)])
def test_one_graph(learns, mode):
    """`fullgraph` makes a graph break an error; the second step of other values must find the first one's graph."""
    with torch.device("meta"):
        unet = UNet(CONFIG)
    fill_by_name(unet, replace(SMALL, unet=CONFIG), "unet.").requires_grad_(False)
    set_mode(unet, mode)
    plain = [step(unet, draw, learns) for draw in range(2)]
    torch._dynamo.reset()
    compile_unet(unet)
    for draw in range(2):
        with torch._dynamo.config.patch(error_on_recompile=draw > 0):
            for ours, reference in zip(step(unet, draw, learns), plain[draw]):
                assert (ours - reference).norm() < 1e-5 * reference.norm()
