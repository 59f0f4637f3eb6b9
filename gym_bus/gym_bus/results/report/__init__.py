"""The report: one self-contained HTML page about one job or several, made from their files alone."""
