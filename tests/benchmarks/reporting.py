"""What a worker tells `compare.py`; needs no library of either side."""

import json
import resource


def report(**values):
    """A line of JSON, with the peak memory of the process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({**values, "peak_mib": peak // 1024}), flush=True)
