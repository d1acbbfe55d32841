"""`python -m adaptive_longformer` is `adaptive-longformer`."""

from adaptive_longformer_command_line import start

if __name__ == "__main__":
    start()
