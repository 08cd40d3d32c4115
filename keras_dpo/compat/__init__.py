"""What reaches into the privates of Keras, Keras-Hub and JAX."""
