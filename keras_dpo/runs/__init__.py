"""A run from its settings to its report: config, `train`, the command line.

The top floor: nothing else imports it.
"""
