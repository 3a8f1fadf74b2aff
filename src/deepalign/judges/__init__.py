"""Who decides whether a response refuses: the protocol every judge follows, and the table of built-in judges."""
