"""Runs from config to report: `DPOConfig`, `train`, the command line.

The top layer of the package: no other subpackage imports it.
"""
