"""What a run has written down, as a page, figures and tables. Reads files only; free of torch."""
