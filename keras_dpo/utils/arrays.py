"""Size constants shared by packing on the host and kernels on the device."""

# Tokens per attention block; row lengths are multiples of it.
BLOCK = 64
# Segments of pair g: 3 g is its prompt, 3 g + 1 chosen, 3 g + 2 rejected.
SEGMENTS = 3


def round_up(number: int, multiple: int) -> int:
    """Round `number` up to a multiple of `multiple`."""
    return -(-int(number) // multiple) * multiple
