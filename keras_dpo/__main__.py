"""`python -m keras_dpo` is `keras-dpo`."""

from keras_dpo.cli import main

if __name__ == "__main__":
    main()
