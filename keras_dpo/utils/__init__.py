"""Files, messages, time limits and sizes that every room needs.

Imports nothing of ours but `errors`.
"""
