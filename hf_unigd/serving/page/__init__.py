"""The page in a browser: searches, asks, and shows alignments and what a summary token says. Needs gradio."""
