"""The smallest model that both libraries can build."""

from dataclasses import replace

from official import SMALL

UNET = replace(SMALL.unet, channel_mult=(1,), attention_resolutions=(1,), num_res_blocks=1)
TOY = replace(SMALL, num_frames=2, size=(32, 16), unet=UNET, vae=replace(SMALL.vae, ch_mult=(1, 2), num_res_blocks=1))
