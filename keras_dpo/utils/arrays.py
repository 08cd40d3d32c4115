"""Sizes that the host's rows and the device's kernels agree on."""

# Tokens of an attention block; row lengths are multiples of it.
BLOCK = 64
# Segments of a pair's group: 3 g its prompt, 3 g + 1 chosen, 3 g + 2 rejected.
SEGMENTS = 3


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple that is not below `number`."""
    return -(-int(number) // multiple) * multiple
