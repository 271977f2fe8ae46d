"""Where models come from, one source per file: each ends in a directory in Hugging Face form."""
