"""Pictures of a run: view pairs, and a page of one HTML file to look at."""
