"""Whatever reaches into private parts of Keras, Keras-Hub or JAX.

Imports `utils` alone; docs/architecture.md lists each work-around, why it is
there, and the test that says when it can go.
"""
