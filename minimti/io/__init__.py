"""Clips and images, and files that appear whole or not at all."""
