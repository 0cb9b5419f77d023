"""The three networks of Stable Video Diffusion. They import nothing of minimti but its configurations."""
