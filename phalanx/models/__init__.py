"""One configurable decoder, one small file per model family, checkpoint loading."""
