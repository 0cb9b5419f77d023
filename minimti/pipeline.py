"""The ways through the model."""

import torch

from minimti.checkpoint.load import Checkpoint, load_into
from minimti.io.files import InputError
from minimti.svd import SVD


def load(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, vae_dtype: torch.dtype = torch.float32
) -> SVD:
    """The model on `device`, frozen: UNet and image encoder in `dtype`, the VAE in `vae_dtype`.

    Raises InputError where the files do not hold exactly the tensors of the model.
    """
    try:
        with torch.device("meta"):
            svd = SVD(checkpoint.config)
    except Exception as error:  # of whichever layer its numbers do not suit
        message = f"{checkpoint.path}: the configuration in its metadata describes no network ({error})"
        raise InputError(message) from error
    load_into(svd, checkpoint, device, dtype, vae_dtype)
    return svd
