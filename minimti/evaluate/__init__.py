"""The paper's experiments on the embedded model, measured: `python -m minimti.evaluate`."""
