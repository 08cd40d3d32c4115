"""`DPOModel`, its pure training steps, and the state a run resumes from.

Sees callbacks only through the base classes here; imports neither `callbacks`
nor `runs`.
"""
