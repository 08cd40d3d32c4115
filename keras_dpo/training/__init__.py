"""`DPOModel`, its pure steps, and the state that a run resumes from.

Knows callbacks by the base classes here; imports neither `callbacks` nor
`runs`.
"""
