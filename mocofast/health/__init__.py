"""Whether a run learns: signals at log lines, and a verdict in words."""
