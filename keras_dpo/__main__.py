"""Entry point: `python -m keras_dpo` runs the `keras-dpo` command."""

from keras_dpo.runs.cli import main

if __name__ == "__main__":
    main()
