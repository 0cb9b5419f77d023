"""Speed, memory and FLOPs of training and sampling, compared with diffusers."""
