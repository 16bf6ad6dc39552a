"""Weight formats: packing, unpacking, quantising."""
