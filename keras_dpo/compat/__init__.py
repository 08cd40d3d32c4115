"""Work-arounds that reach into private parts of Keras, Keras-Hub or JAX.

Imports only `utils`; docs/architecture.md lists each work-around, its reason,
and the test that tells when it can be removed.
"""
