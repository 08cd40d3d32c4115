"""`python -m keras_dpo` is `keras-dpo`."""

from keras_dpo.runs.cli import main

if __name__ == "__main__":
    main()
