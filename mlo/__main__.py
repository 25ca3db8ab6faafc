"""`python -m mlo` is `mlo`: for a checkout that is not installed, and for the processes that `mlo sweep` starts."""

from mlo.cli import main

if __name__ == "__main__":
    main(prog_name="mlo")
