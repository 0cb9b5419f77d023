"""Trains the embedded model `tiny` on the procedural world, in the stages in which SVD was made."""
