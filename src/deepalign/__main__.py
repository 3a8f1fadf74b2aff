"""`python -m deepalign` and the `deepalign` command."""

import sys

from deepalign.cli import main as run


def main() -> None:
    """Run the command line and exit with its status."""
    sys.exit(run())


if __name__ == "__main__":
    main()
