"""Official weight files: finding, downloading, reading them, and telling them apart."""
