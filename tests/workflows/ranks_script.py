"""The command line without drawing, which takes seconds for each run; for processes that a launcher starts."""

import sys

from deepalign import cli
from deepalign.workflows import reporting

if __name__ == "__main__":
    # Only in a process of its own: the tests import this file for its path.
    reporting.save_figures = lambda *_: None
    reporting.render_page = lambda *_, **__: "<html></html>"
    sys.exit(cli.main(sys.argv[1:]))
